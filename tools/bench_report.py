"""What reporting a step costs: metrics, chart, TensorBoard, and the progress bar, each apart.

    python tools/bench_report.py [--steps 3000]

Real reporters write real files in a temporary folder; only the model is missing. Medians per step, in microseconds.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from niels_gpt.train.bar import Bar
from niels_gpt.train.board import open_board
from niels_gpt.train.clock import ActivityClock
from niels_gpt.train.report import Reporter, StepReport


def report_of(step: int, steps: int) -> StepReport:
    loss = 9.7 / (step + 1) ** 0.1
    return StepReport(step, steps, step / steps, 1e-3, loss, loss, 0.5, 4096, 4096 * step, 0.3, 100.0, 0)


def microseconds(call: Callable[[int], object], steps: int, done: Callable[[], object] = lambda: None) -> list[float]:
    """[median of one call, CPU time of all threads per call] once `done` has waited for the threads."""
    times, cpu = [], time.process_time()
    for step in range(1, steps + 1):
        began = time.perf_counter()
        call(step)
        times.append(time.perf_counter() - began)
    done()
    return [statistics.median(times) * 1e6, (time.process_time() - cpu) / steps * 1e6]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="reports to time (default: %(default)s)")
    steps = parser.parse_args(argv).steps
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        rows = measure(steps)
        os.chdir("/")
    print("| part | median, us | CPU, us |\n|---|---|---|")
    for name, (median, cpu) in rows.items():
        print(f"| {name} | {median:.1f} | {cpu:.1f} |")
    return 0


def measure(steps: int) -> dict[str, list[float]]:
    """part -> microseconds per step."""
    reports = [report_of(step, steps) for step in range(steps + 1)]
    clock = ActivityClock()

    def activities(step: int) -> None:
        for activity in ("step", "data", "evaluation"):
            with clock(activity):
                pass

    rows = {"clock, three activities": microseconds(activities, steps)}
    reporter = Reporter("pretrain", "bench", quiet=True)
    reporter.metrics.reopen("pretrain", 0)
    rows["metrics.jsonl and chart"] = microseconds(lambda step: reporter.step(reports[step]), steps)
    reporter.close()
    board = open_board(reporter.folder / "tensorboard", 0, say=print, warn=print)
    if board is not None:
        write = lambda step: board.scalars(step, reporter._scalars(reports[step], 0.5))  # noqa: E731
        rows["TensorBoard"] = microseconds(write, steps, board.close)
    bar = Bar("pretrain", Console(file=io.StringIO(), force_terminal=True, width=120))
    show = lambda step: bar.show(step / steps, reporter._pace(reports[step]))  # noqa: E731
    rows["bar, once a second"] = microseconds(show, min(steps, 200))
    bar.stop()
    return rows


if __name__ == "__main__":
    sys.exit(main())
