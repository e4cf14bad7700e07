"""`niels-gpt runs`: what runs there are, and what one of them did with its time.

    niels-gpt runs
    niels-gpt runs show [RUN] [--limit 0.02]

RUN is an id, a folder or a metrics file; without it, the newest. With --limit the exit code is 1 if data, evaluation,
logging or saving took more than that share of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from niels_gpt import paths
from niels_gpt.command import exit_status
from niels_gpt.console import wide_console
from niels_gpt.train.clock import WATCHED, shares, time_table
from niels_gpt.train.metrics import read_metrics

METRICS = "metrics.jsonl"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="niels-gpt runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="one run: its last figures, and where its time went")
    show.add_argument("run", nargs="?", help="id, folder or metrics file; the newest run without it")
    show.add_argument("--limit", type=float, metavar="SHARE", help="fail if a watched phase took more (0.02 = 2%%)")
    args = parser.parse_args(argv)
    if getattr(args, "limit", None) is not None and not 0 < args.limit < 1:
        parser.error(f"--limit must be a share between 0 and 1, not {args.limit:g}")
    console = wide_console()
    if args.command == "show":
        gone = 0 if args.limit is None else 1
        return exit_status(lambda: show_run(console, find_run(args.run), args.limit), reader_gone=gone)
    return exit_status(lambda: list_runs(console), reader_gone=0)


def metrics_files() -> list[Path]:
    """The metrics of all runs here, oldest first."""
    return sorted(paths.RUNS_DIR.glob(f"*/{METRICS}"), key=lambda path: path.stat().st_mtime_ns)


def find_run(name: str | None) -> Path:
    """The metrics file of a run; FileNotFoundError says where it was looked for."""
    if name is None:
        if found := metrics_files():
            return found[-1]
        raise FileNotFoundError(f"there are no runs in {paths.RUNS_DIR}/; train something first")
    for path in (Path(name), Path(name) / METRICS, paths.RUNS_DIR / name / METRICS):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no run {name!r}: neither {Path(name) / METRICS} nor {paths.RUNS_DIR / name}")


def list_runs(console: Console) -> int:
    files = metrics_files()
    if not files:
        console.print(f"no runs in {paths.RUNS_DIR}/ yet", markup=False)
        return 0
    table = Table()
    for column in ("run", "phase", "steps", "loss", "bits per byte", "minutes"):
        table.add_column(column, justify="left" if column in ("run", "phase", "bits per byte") else "right")
    for path in files:
        for phase, last in _by_phase(read_metrics(path)).items():
            step, times = last.get("step", {}), last.get("time", {}).get("seconds", {})
            loss = step.get("mean_loss")
            cells = (f"{step.get('step', 0):,}", "" if loss is None else f"{loss:.4f}", _bits(last.get("eval", {})))
            table.add_row(path.parent.name, phase, *cells, f"{sum(times.values()) / 60:.1f}")
    console.print(table)
    return 0


def show_run(console: Console, path: Path, limit: float | None) -> int:
    entries = read_metrics(path)
    if not entries:
        raise ValueError(f"{path} holds no metrics")
    over = []
    for phase, last in _by_phase(entries).items():
        if "time" not in last:
            raise ValueError(f"{path} does not say where the time of {phase} went: it never saved, or is an old run")
        step = last.get("step", {})
        console.print(f"{path.parent.name}: {phase}, step {step.get('step', 0):,}; {_bits(last.get('eval', {}))}")
        seconds = last["time"]["seconds"]
        console.print(time_table(seconds))
        part = shares(seconds)
        over += [
            f"{phase}: {name} took {part[name]:.2%}" for name in WATCHED if limit is not None and part[name] > limit
        ]
    for line in over:
        print(f"over the limit of {limit:.2%}: {line}", file=sys.stderr)
    return 1 if over else 0


def _by_phase(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """phase -> kind -> its last entry."""
    last: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        last.setdefault(entry["phase"], {})[entry["kind"]] = entry
    return last


def _bits(entry: dict[str, Any]) -> str:
    bits = entry.get("bits_per_byte") or {}
    return ", ".join(f"{name} {value:.3f}" for name, value in bits.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
