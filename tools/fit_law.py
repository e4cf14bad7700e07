"""Fit the loss curve of the plan to docs/law/*.jsonl; write niels_gpt/plan/law.json and docs/law/fit.md

    python tools/fit_law.py [--data docs/law/*.jsonl]

Every run is left out once and predicted from the others: that error is the band's. Its growth beyond the fitted range
is measured by leaving out all runs of the most tokens and predicting them from those of at most a quarter.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt import files, paths
from niels_gpt.plan.law import FILE, KNOWN_TEXT, Law
from niels_gpt.plan.recipe import Size

LAW_DATA = paths.PROJECT_ROOT / "docs/law"
NOISE = 0.004  # standard deviation of a run's logarithm between seeds, about; residuals are counted in it
HUBER = 2.0  # of that, beyond which a residual counts linearly: one bad run must not bend the curve
MAIN = "chitchat"
# Every coefficient's logarithm (logit for shares): where it starts, and how far from there it goes without good reason.
PRIORS = {
    "E": (math.log(1.2), 0.3),
    "A": (math.log(40.0), 3.0),
    "a": (math.log(0.34), 0.4),  # Hoffmann et al. 2022
    "B": (math.log(60.0), 3.0),
    "b": (math.log(0.28), 0.4),
    "c": (math.log(0.05), 0.7),
    "embedding": (0.0, 1.5),
    "repeats": (math.log(10.0), 0.7),  # Muennighoff et al. 2023: 15
    "excess": (math.log(0.1), 1.5),
    "excess_size": (math.log(1.5), 0.5),
    "excess_epochs": (math.log(2.5), 0.5),
}
SHARES = ("embedding",)
SOURCE_SPREAD = 0.3
NAMES = tuple(PRIORS)
ROUNDS, SMALL = 200, 1e-10
FEWEST = 12  # runs: more than there are coefficients


@dataclass(frozen=True)
class Point:
    """One run as the fit sees it."""

    size: Size
    tokens: float
    unique: float
    source: str
    bpb: float
    label: str


def load_points(files_of: Sequence[Path]) -> list[Point]:
    """Runs of the shipped recipe; those with other rates, batches or dropout are experiments, not data."""
    points = []
    for path in files_of:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            run = row["run"]
            if run["drop"] or any(run[name] != 1 for name in ("batch", "sft_batch", "adam", "muon")):
                continue
            size = Size(row["params"], row["embedding_params"], 0.0)
            label = f"{row['C']}x{row['L']}, {row['tokens'] / 1e6:.2f} M tokens"
            unique = row["unique_tokens"]
            points.append(Point(size, row["tokens"], unique, run["data"], row["bpb"], label))
    return points


def fit(points: Sequence[Point], start: Law | None = None) -> Law:
    """The curve that is nearest in the logarithm: Levenberg-Marquardt with Huber weights and weak priors."""
    sources = sorted({p.source for p in points} - {MAIN})
    middle = np.array([PRIORS[name][0] for name in NAMES] + [0.0] * len(sources))
    raw = middle if start is None else _raw(start, sources)
    law = _law(_minimum(lambda x: _residuals(x, points, sources), raw), sources)
    counted = [law.counted(p.size) for p in points]
    tokens = [p.tokens for p in points]
    return replace(
        law,
        parameters=(min(counted), max(counted)),
        tokens=(min(tokens), max(tokens)),
        epochs=max(p.tokens / p.unique for p in points),
    )


def _law(raw: np.ndarray, sources: Sequence[str]) -> Law:
    values = {
        name: 1 / (1 + math.exp(-x)) if name in SHARES else math.exp(x) for name, x in zip(NAMES, raw, strict=False)
    }
    factors = {name: math.exp(x) for name, x in zip(sources, raw[len(NAMES) :], strict=True)}
    return Law(
        **values,
        error=0.0,
        beyond=0.0,
        parameters=(0.0, math.inf),
        tokens=(0.0, math.inf),
        epochs=math.inf,
        sources={MAIN: KNOWN_TEXT, **factors},
    )


def _raw(law: Law, sources: Sequence[str]) -> np.ndarray:
    def one(name: str) -> float:
        value = getattr(law, name)
        return math.log(value / (1 - value)) if name in SHARES else math.log(value)

    return np.array([one(name) for name in NAMES] + [math.log(law.sources.get(name, KNOWN_TEXT)) for name in sources])


def _residuals(raw: np.ndarray, points: Sequence[Point], sources: Sequence[str]) -> np.ndarray:
    """Of every run, in units of the noise between seeds, then of every prior, in its own."""
    law = _law(raw, sources)
    runs = [residual(law, point) / NOISE for point in points]
    priors = [(x - PRIORS[name][0]) / PRIORS[name][1] for name, x in zip(NAMES, raw, strict=False)]
    return np.array(runs + priors + [x / SOURCE_SPREAD for x in raw[len(NAMES) :]])


def _minimum(residuals: Callable[[np.ndarray], np.ndarray], first: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt with Huber's loss by reweighting."""
    x, damping = first.copy(), 1e-2
    here = residuals(x)
    for _ in range(ROUNDS):
        weights = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(here), SMALL)))
        steps = 1e-6 * np.eye(len(x))
        slopes = np.stack([(residuals(x + d) - here) / 1e-6 for d in steps], axis=1) * weights[:, None]
        normal, gradient = slopes.T @ slopes, slopes.T @ (weights * here)
        while damping < 1e12:
            step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + SMALL), gradient)
            there = residuals(x + np.clip(step, -0.5, 0.5))
            if _huber(there) < _huber(here):
                break
            damping *= 4
        else:
            return x
        gained = _huber(here) - _huber(there)
        x, here, damping = x + np.clip(step, -0.5, 0.5), there, max(1e-9, damping / 3)
        if gained < 1e-9 * _huber(here):
            break
    return x


def _huber(residuals: np.ndarray) -> float:
    size = np.abs(residuals)
    return float(np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum())


def residual(law: Law, point: Point) -> float:
    """Logarithm of what was measured over what the curve says."""
    curve = law.curve(point.size, point.tokens, unique=point.unique)
    return math.log(point.bpb / (law.sources.get(point.source, 1.0) * curve))


def left_out(points: Sequence[Point], law: Law) -> list[float]:
    """Each run's residual under the curve of all others."""
    return [residual(fit([*points[:i], *points[i + 1 :]], law), point) for i, point in enumerate(points)]


def beyond(points: Sequence[Point], law: Law) -> float:
    """Root mean square error per doubling, predicting the runs of most tokens from those of a quarter and less."""
    most = max(p.tokens for p in points)
    seen = [p for p in points if p.tokens <= 0.3 * most]
    far = [p for p in points if p.tokens > 0.9 * most]
    if len(seen) < FEWEST or not far:
        return 0.02
    fitted = fit(seen, law)
    doublings = math.log2(most / max(p.tokens for p in seen))
    return math.sqrt(statistics.mean(residual(fitted, p) ** 2 for p in far)) / doublings


def report(points: Sequence[Point], law: Law, outside: Sequence[float]) -> str:
    """The fit as Markdown."""
    lines = ["| run | text | measured | curve | error | left out |", "|---|---|---|---|---|---|"]
    for point, out in sorted(zip(points, outside, strict=True), key=lambda x: (x[0].size.parameters, x[0].tokens)):
        said = point.bpb / math.exp(residual(law, point))
        error = f"{residual(law, point):+.2%} | {out:+.2%}"
        lines.append(f"| {point.label} | {point.source} | {point.bpb:.4f} | {said:.4f} | {error} |")
    inside = math.sqrt(statistics.mean(residual(law, p) ** 2 for p in points))
    left = math.sqrt(statistics.mean(r * r for r in outside))
    return "\n".join(
        [
            "# The fit of the loss curve",
            "",
            "Written by `python tools/fit_law.py`; do not edit. [planning.md](../planning.md) says what it means.",
            "",
            f"{len(points)} runs; root mean square error {inside:.2%} of those fitted, {left:.2%} of those left out;",
            f"largest left out {max(map(abs, outside)):.2%}; {law.beyond:.2%} more for each doubling beyond the range.",
            "",
            "| coefficient | value |",
            "|---|---|",
            *(f"| {name} | {getattr(law, name):.5g} |" for name in NAMES),
            *(f"| factor of {name} | {factor:.4f} |" for name, factor in law.sources.items()),
            "",
            *lines,
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fit the loss curve of the plan.")
    parser.add_argument("--data", nargs="+", type=Path, help="runs (default: docs/law/*.jsonl)")
    parser.add_argument("--out", type=Path, default=FILE, help="default: %(default)s")
    parser.add_argument("--report", type=Path, default=LAW_DATA / "fit.md", help="default: %(default)s")
    args = parser.parse_args(argv)
    points = load_points(args.data or sorted(LAW_DATA.glob("*.jsonl")))
    if len(points) < FEWEST:
        print(f"error: {len(points)} runs are too few for a fit; tools/law_runs.py makes them", file=sys.stderr)
        return 1
    law = fit(points)
    outside = left_out(points, law)
    law = replace(law, error=_deviation(outside), beyond=beyond(points, law))
    kept: dict[str, Any] = {"_why": "Written by tools/fit_law.py; docs/planning.md explains it.", "law": vars(law)}
    kept["runs"] = len(points)
    files.write_json(args.out, kept)
    text = report(points, law, outside)
    files.write_text(args.report, text)
    print(text)
    return 0


def _deviation(outside: Sequence[float]) -> float:
    return math.sqrt(statistics.mean(r * r for r in outside))


if __name__ == "__main__":
    sys.exit(main())
