"""What the quality benchmark says: results.json, when ours has reached the peer's last figure, a table and a plot"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from niels_gpt.files import read_json, write_text
from tools.quality_systems import OURS, PEER, Point, Run
from tools.quality_text import Floor

TARGET = 0.5  # of the peer's time


@dataclass
class Results:
    """All runs on one text, the newest of each kind."""

    setup: dict[str, Any]  # what runs must share to be compared: text, tokenizer, windows, machine
    floor: Floor | None = None
    runs: list[Run] = field(default_factory=list)

    def add(self, run: Run) -> None:
        self.runs = [old for old in self.runs if _kind(old) != _kind(run)] + [run]

    def of(self, minutes: float, threads: int, seed: int) -> list[Run]:
        """Ours first, then the peers by learning rate."""
        wanted = [r for r in self.runs if (r.minutes, r.threads, r.seed) == (minutes, threads, seed)]
        return sorted(wanted, key=lambda r: (r.system != OURS, r.lr or 0.0, r.batch))

    def best_peer(self, minutes: float | None = None) -> Run | None:
        """The peer with the lowest final figure, of the runs of this length or, without one, of the longest."""
        peers = [run for run in self.runs if run.system == PEER]
        length = max((run.minutes for run in peers), default=None) if minutes is None else minutes
        return min((r for r in peers if r.minutes == length), key=lambda r: r.points[-1].bits, default=None)


def _kind(run: Run) -> tuple[Any, ...]:
    return run.name, run.batch, run.minutes, run.threads, run.seed


def read_results(path: Path, setup: dict[str, Any]) -> Results:
    """The results of earlier runs, none if there is no file; ValueError if they are not of this text and machine."""
    if not path.is_file():
        return Results(setup)
    try:
        found = read_json(path)
        floor = Floor(**found["floor"]) if found["floor"] else None
        results = Results(found["setup"], floor, [Run.from_record(record) for record in found["runs"]])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this benchmark ({error}); move it away") from None
    different = sorted(k for k in setup.keys() | results.setup.keys() if setup.get(k) != results.setup.get(k))
    if different:
        raise ValueError(f"{path} holds runs with other {', '.join(different)}; choose another --out or move it away")
    return results


def write_results(path: Path, results: Results) -> None:
    """All runs, and what comes of comparing those of one length."""
    lengths = sorted({(run.minutes, run.threads, run.seed) for run in results.runs})
    record = {
        "setup": results.setup,
        "floor": asdict(results.floor) if results.floor else None,
        "runs": [run.record() for run in results.runs],
        "comparisons": [asdict(found) for length in lengths if (found := compare(results.of(*length)))],
    }
    write_text(path, json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True)
class Comparison:
    """Ours beside the best peer of the same length."""

    minutes: float
    peer: str
    peer_bits: float
    peer_minutes: float
    our_bits: float
    our_minutes: float | None  # when ours has reached peer_bits; None: it has not
    ratio: float | None  # our_minutes / peer_minutes


def compare(runs: Sequence[Run]) -> Comparison | None:
    """None unless there are runs of both systems."""
    ours = next((run for run in runs if run.system == OURS), None)
    peers = [run for run in runs if run.system == PEER]
    if ours is None or not peers:
        return None
    best = min(peers, key=lambda run: run.points[-1].bits)
    end = best.points[-1]
    reached = reached_at(ours.points, end.bits)
    ratio = None if reached is None else reached / end.minutes
    return Comparison(ours.minutes, best.name, end.bits, end.minutes, ours.points[-1].bits, reached, ratio)


def reached_at(points: Sequence[Point], bits: float) -> float | None:
    """Minutes after which a curve is first at or below `bits`, on straight lines between its points."""
    for before, after in pairwise(points):
        if before.bits <= bits:
            return before.minutes
        if after.bits <= bits:
            share = (before.bits - bits) / (before.bits - after.bits)
            return before.minutes + share * (after.minutes - before.minutes)
    return points[-1].minutes if points and points[-1].bits <= bits else None


def table(runs: Sequence[Run], floor: Floor | None) -> str:
    """Bits per byte against training time, as Markdown."""
    rows = [["minutes", *(run.name for run in runs)], ["---:"] * (len(runs) + 1)]
    for i in range(max(len(run.points) for run in runs)):
        at = max(run.points[i].minutes for run in runs if i < len(run.points))
        rows.append([f"{at:.2f}", *(f"{run.points[i].bits:.4f}" if i < len(run.points) else "" for run in runs)])
    rows.append(["all held-out text", *(f"{run.final_bits:.4f}" for run in runs)])
    rows.append(["tokens", *(f"{run.points[-1].tokens:,}" for run in runs)])
    rows.append(["tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in runs)])
    rows.append(["rows a step", *(str(run.batch) for run in runs)])
    rows.append(["parameters", *(f"{run.parameters:,}" for run in runs)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if floor:
        lines += [
            "",
            f"Floor: byte {floor.order}-gram, modified Kneser-Ney, {floor.train_bytes:,} bytes: {floor.windows:.4f} "
            f"bits per byte ({floor.everything:.4f} of all held-out text, {floor.held_out_bytes:,} bytes).",
        ]
    return "\n".join(lines)


def verdict(runs: Sequence[Run], floor: Floor | None) -> str:
    """Whether the targets are met, in sentences."""
    said = []
    found = compare(runs)
    if found is not None and found.our_minutes is not None and found.ratio is not None:
        met = "met" if found.ratio <= TARGET else "NOT met"
        said.append(
            f"Ours reaches the last {found.peer_bits:.4f} of {found.peer} ({found.peer_minutes:.2f} minutes) after "
            f"{found.our_minutes:.2f} minutes: {found.ratio:.2f} of its time (target {TARGET:g}: {met}), "
            f"and ends at {found.our_bits:.4f}."
        )
    elif found is not None:
        said.append(f"Ours ends at {found.our_bits:.4f} and has NOT reached the peer's {found.peer_bits:.4f}.")
    peers = [run for run in runs if run.system == PEER]
    if len(peers) > 2:
        best = min(peers, key=lambda run: run.points[-1].bits)
        if best in (peers[0], peers[-1]):
            said.append(f"The peer's best learning rate, {best.lr:g}, is at the edge of those tried: try further.")
    for run in runs if floor else []:
        assert floor is not None
        if run.final_bits >= floor.everything:
            said.append(f"{run.name} does NOT beat the n-gram floor.")
    return "\n".join(said)


# ---- the plot, written by hand: two axes and some lines need no plotting library

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 64, 170, 40, 48
OUR_COLOUR, FLOOR_COLOUR = "#d1495b", "#777777"
PEER_COLOURS = ("#00798c", "#3f88c5", "#8ab0ab", "#5d576b")


def plot(runs: Sequence[Run], floor: Floor | None) -> str:
    """An SVG: bits per byte against minutes of training, the floor as a dashed line."""
    curves = [[(p.minutes, p.bits) for p in run.points if p.minutes] for run in runs]
    bits = [b for curve in curves for _, b in curve] + ([floor.windows] if floor else [])
    x_end = max(m for curve in curves for m, _ in curve)
    low, high = min(bits), max(bits)
    margin = 0.05 * (high - low or 1)
    low, high = low - margin, high + margin

    def x(minutes: float) -> float:
        return LEFT + minutes / x_end * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">held-out bits per byte against minutes of training</text>',
        *_axes(x, y, x_end, low, high),
    ]
    legend = TOP + 10
    peer_colours = iter(PEER_COLOURS * len(runs))
    for run, curve in zip(runs, curves, strict=True):
        colour = OUR_COLOUR if run.system == OURS else next(peer_colours)
        path = " ".join(f"{x(m):.1f},{y(b):.1f}" for m, b in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(m):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for m, b in curve]
        parts += _entry(legend, colour, f"{run.name}: {curve[-1][1]:.3f}", dashed=False)
        legend += 22
    if floor:
        at = y(floor.windows)
        parts.append(
            f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="{FLOOR_COLOUR}" '
            'stroke-width="2" stroke-dasharray="6 4"/>'
        )
        parts += _entry(legend, FLOOR_COLOUR, f"byte {floor.order}-gram: {floor.windows:.3f}", dashed=True)
    return "\n".join([*parts, "</svg>", ""])


def _axes(x: Any, y: Any, x_end: float, low: float, high: float) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in _ticks(low, high):
        yield f'<line x1="{LEFT}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in _ticks(0, x_end):
        yield f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value:g}</text>'
        yield f'<line x1="{x(value):.1f}" y1="{bottom}" x2="{x(value):.1f}" y2="{bottom + 5}" stroke="black"/>'
    yield f'<polyline points="{LEFT},{TOP} {LEFT},{bottom} {right},{bottom}" fill="none" stroke="black"/>'
    yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 40}" text-anchor="middle">minutes</text>'


def _entry(at: float, colour: str, label: str, *, dashed: bool) -> Iterator[str]:
    left = WIDTH - RIGHT + 10
    style = ' stroke-dasharray="6 4"' if dashed else ""
    yield f'<line x1="{left}" y1="{at}" x2="{left + 22}" y2="{at}" stroke="{colour}" stroke-width="2"{style}/>'
    yield f'<text x="{left + 28}" y="{at + 4}">{escape(label)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round numbers between two values."""
    step = next(s for s in (m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)) if (high - low) / s <= 6)
    first = -int(-low // step)  # rounded up
    return [round(i * step, 9) for i in range(first, int(high // step) + 1)]
