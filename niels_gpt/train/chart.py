"""`runs/<id>/report.html`: training loss, validation bits per byte and learning rate as one file for any browser."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from niels_gpt.files import write_text

MOST_POINTS = 1000  # of a curve; when there are more, neighbours become one
WRITE_SECONDS = 10.0  # between two versions of the file
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, TICKS = 760, 200, 70, 14, 4
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:14px system-ui,sans-serif;max-width:860px;margin:2em auto}}
svg{{display:block;width:100%}}svg text{{font-size:11px;fill:currentColor}}h2{{font-size:1em;margin:1.5em 0 0}}
pre{{white-space:pre-wrap}}</style>
<h1>{title}</h1><p>{summary}</p>{body}</html>
"""
Points = list[tuple[float, float]]  # (step, value)


class Curve:
    """A curve of bounded size: each point is the mean of as many neighbours as that needs."""

    def __init__(self) -> None:
        self.points: Points = []
        self._each, self._open = 1, []  # type: int, Points

    def add(self, step: float, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        self._open.append((step, value))
        if len(self._open) < self._each:
            return
        self.points.append(_mean(self._open))
        self._open = []
        if len(self.points) == MOST_POINTS:
            self.points = [_mean(self.points[i : i + 2]) for i in range(0, len(self.points), 2)]
            self._each *= 2


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


class Chart:
    """Collects a run's entries (those of metrics.jsonl) and draws them."""

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title = path, title
        self._written = -math.inf
        self.replace(())

    def replace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Begin anew, with these entries."""
        self._loss, self._rate = Curve(), Curve()
        self._bits: dict[str, Curve] = {}
        self._last: dict[str, Any] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Mapping[str, Any]) -> None:
        """A `step` or `eval` entry."""
        if entry["kind"] == "step":
            self._loss.add(entry["step"], entry["loss"])
            self._rate.add(entry["step"], entry["lr"])
        elif entry["kind"] == "eval":
            self._last = dict(entry)
            for name, value in (entry.get("bits_per_byte") or {}).items():
                self._bits.setdefault(name, Curve()).add(entry["step"], value)

    def write(self, warn: Callable[[str], None], *, final: bool = False) -> None:
        """Replace the file, if the last time is long enough ago or this is the end."""
        if not final and time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written = time.monotonic()
        try:
            write_text(self._path, self.page())
        except OSError as error:
            warn(f"{self._path} cannot be written: {error.strerror or error}; training goes on")

    def page(self) -> str:
        bits = {name: curve.points for name, curve in self._bits.items() if curve.points}
        body = panel("training loss, nats per token", {"loss": self._loss.points})
        body += panel("validation bits per byte", bits) + panel("learning rate", {"lr": self._rate.points})
        if sample := self._last.get("sample"):
            body += f"<h2>the model, asked to go on</h2><pre><b>{html.escape(sample['prompt'])}</b> "
            body += f"{html.escape(sample['text'])}</pre>"
        shown = [f"{name} {points[-1][1]:.3f} bits per byte" for name, points in bits.items()]
        at = f"step {self._last['step']}: " if self._last else ""
        return PAGE.format(title=html.escape(self._title), summary=html.escape(at + ", ".join(shown)), body=body)


def panel(title: str, curves: Mapping[str, Points], *, by: str = "step", doubling: bool = False) -> str:
    """One diagram as SVG; "" without points. doubling: every doubling of x is as wide as the next."""
    scaled, unscaled = (math.log2, lambda x: 2.0**x) if doubling else (float, float)
    every = [(scaled(x), y) for points in curves.values() for x, y in points]
    if not every:
        return ""
    (x0, x1), (y0, y1) = _range([x for x, _ in every]), _range([y for _, y in every])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (scaled(x) - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return round(LEFT + across * PANEL_WIDTH, 1), round(TOP + (1 - up) * PANEL_HEIGHT, 1)

    parts = []
    for i in range(TICKS + 1):
        x, y = unscaled(x0 + (x1 - x0) * i / TICKS), y0 + (y1 - y0) * i / TICKS
        (px, _), (_, py) = place(x, y), place(x, y)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PANEL_WIDTH}" y1="{py}" y2="{py}" stroke="#8884"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4}" text-anchor="end">{y:.4g}</text>')
        parts.append(f'<text x="{px}" y="{TOP + PANEL_HEIGHT + 16}" text-anchor="middle">{_tick(x, x1 - x0)}</text>')
    for i, (name, points) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{px},{py}" for px, py in (place(x, y) for x, y in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        last, label = place(*points[-1]), html.escape(f"{name} {points[-1][1]:.4g}")
        parts.append(f'<circle cx="{last[0]}" cy="{last[1]}" r="2.5" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + PANEL_WIDTH}" y="{TOP + 12 * (i + 1)}" text-anchor="end"')
        parts.append(f' style="fill:{color}">{label}</text>')
    size = f"0 0 {LEFT + PANEL_WIDTH + 30} {TOP + PANEL_HEIGHT + 26}"
    return f'<h2>{html.escape(title)}, by {html.escape(by)}</h2><svg viewBox="{size}" role="img">{"".join(parts)}</svg>'


def _tick(x: float, span: float) -> str:
    return f"{x:,.0f}" if span >= 2 * TICKS or x == round(x) else f"{x:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
