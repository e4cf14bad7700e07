"""`niels-gpt bench`: which model sizes train how fast here, how large a microbatch fits, and how good they would get.

    niels-gpt bench [--device auto] [--grid preset|FILE] [--timeout_s 20] [--max_micro_B 256] [--out_dir bench/]

Every trial is the real training step on random tokens in a fresh process. Writes results.jsonl (every trial),
summary.md and summary.html. A sweep that was stopped goes on where it was when the same command is run again.
Exit code 0 if a configuration works, 1 if none does, 2 for wrong usage, 128+n after signal n.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from niels_gpt import files
from niels_gpt.bench import grids, summary
from niels_gpt.bench.grids import Candidate
from niels_gpt.bench.results import Results
from niels_gpt.bench.search import largest_microbatch
from niels_gpt.bench.trial import Result, run_trial
from niels_gpt.command import exit_status
from niels_gpt.console import OutputConsole, wide_console
from niels_gpt.device import choose_precision, resolve_device
from niels_gpt.machine import Machine, probe
from niels_gpt.settings import Settings, load_overrides, validate_overrides
from niels_gpt.train.bar import Bar
from niels_gpt.train.report import duration
from niels_gpt.train.signals import leaving_on_signals

COMPILE_SECONDS = 180.0  # more for a trial whose first step compiles
PRESET = "preset"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        settings, device = settings_of(args), resolve_device(args.device)
        candidates = grids.from_file(args.grid, settings) if args.grid != PRESET else None
    except (ValueError, OSError) as error:
        parser.error(files.explained(error))

    def work() -> int:
        with leaving_on_signals():
            return Sweep(settings, device, candidates, Path(args.out_dir)).run(args.fresh)

    return exit_status(work, go_on="run the same command again to go on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="niels-gpt bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument(
        "--grid",
        default=PRESET,
        metavar="preset|FILE",
        help="what to try: a JSON list of"
        " {T, C, L, H, d_ff, amp, amp_dtype, activation_checkpointing} (default: by device and memory)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="settings for all the rest: vocabulary, optimizer, compile ..."
    )
    parser.add_argument("--out_dir", "--out-dir", default="bench/", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew, also what is in DIR already")
    for name, (kind, help_text) in KNOBS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=kind, metavar="N", help=help_text)
    return parser


KNOBS: dict[str, tuple[Any, str]] = {  # of the settings' section `benchmark`, which has their defaults and bounds
    "timeout_s": (float, "longest trial, seconds (20)"),
    "steps_warmup": (int, "untimed steps of a trial (2)"),
    "steps_measure": (int, "timed steps of a trial (10)"),
    "seed": (int, "of weights and tokens (42)"),
    "max_micro_B": (int, "largest microbatch to try (256)"),
}


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of --config with the flags on top."""
    overrides = load_overrides(args.config)
    flags = {name: value for name in KNOBS if (value := getattr(args, name)) is not None}
    given = overrides.get("benchmark", {})
    bench = {**given, **flags} if isinstance(given, Mapping) else given
    return validate_overrides({**overrides, "benchmark": bench})


class Sweep:
    """The trials of a grid on a device, with what is known of them in a folder."""

    def __init__(self, settings: Settings, device: str, candidates: list[Candidate] | None, folder: Path) -> None:
        """candidates: None for the preset that fits the machine."""
        self.settings, self.device, self.folder = settings, device, folder
        self.machine: Machine = probe()
        phase = settings.training.pretrain
        precision = choose_precision(device, phase.amp, phase.amp_dtype)
        self.candidates = candidates or grids.preset(settings, precision, self.machine.memory_of(device))
        self.timeout_s = settings.benchmark.timeout_s + (COMPILE_SECONDS if phase.compile else 0.0)
        self.console = OutputConsole()

    def run(self, fresh: bool = False) -> int:
        """Measure what is not known yet; the exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                return self._run(self.folder / "results.jsonl", fresh)
        except Timeout:
            raise OSError(f"another sweep is writing to {self.folder}; wait for it or choose --out_dir") from None

    def _run(self, path: Path, fresh: bool) -> int:
        if fresh:
            path.unlink(missing_ok=True)
        self.results = Results(path, self.machine.describe(self.device))
        self.console.print(f"{self.device}: {self.results.machine}", markup=False)
        self.console.print(f"{len(self.candidates)} configurations; trials of at most {self.timeout_s:g} s")
        watch = Watch(self.console, len(self.candidates), self.settings.benchmark.max_micro_B)
        try:
            for number, candidate in enumerate(self.candidates):
                self._search(number, candidate, watch)
                self._summarise()
        finally:
            watch.stop()
        return self._show(watch)

    def _search(self, number: int, candidate: Candidate, watch: Watch) -> None:
        one_row = candidate.trial(self.settings, self.device)

        def measure(micro_B: int) -> Result:
            trial = one_row.with_rows(micro_B)
            result = self.results.known(trial, self.timeout_s)
            if result is not None:
                watch.known += 1
                return result
            watch.begins(number, candidate, micro_B)
            result = run_trial(trial, self.timeout_s)
            self.results.add(result, self.timeout_s)
            watch.ended(candidate, result)
            return result

        largest_microbatch(measure, self.settings.benchmark.max_micro_B)

    def _summarise(self) -> list[summary.Configuration]:
        rows = self.results.here(self.device)
        return summary.write(self.folder, self.device, rows, self.settings, self.results.machine)

    def _show(self, watch: Watch) -> int:
        order = summary.ranked(self._summarise())
        if watch.known:
            print(f"{watch.known} trials had been measured before (--fresh measures them anew)", file=sys.stderr)
        files_written = f"{self.folder / 'summary.md'}, {self.folder / 'summary.html'}, {self.results.path}"
        if not order:
            print(f"error: no configuration works here; {self.results.path} has the reasons", file=sys.stderr)
            return 1
        wide_console().print(summary.table(order))
        self.console.print(files_written, markup=False)
        return 0


class Watch:
    """What a sweep says while it goes on: a bar with the time left on a terminal, a line for every trial elsewhere."""

    def __init__(self, console: Console, configurations: int, limit: int) -> None:
        self.console, self.configurations = console, configurations
        self._trials_each = 2 * math.ceil(math.log2(limit) + 1)  # at most: doubling, then bisection
        self._bar = Bar("bench", console) if console.is_terminal else None
        self._began = time.monotonic()
        self._here = 0  # trials of the configuration at hand
        self._number = 0
        self.known = 0

    def begins(self, number: int, candidate: Candidate, micro_B: int) -> None:
        if number != self._number:
            self._number, self._here = number, 0
        if self._bar is not None:
            parts = [f"{number + 1}/{self.configurations} {candidate.name}, {micro_B} rows", self._left()]
            self._bar.show(self._progress(), parts)

    def ended(self, candidate: Candidate, result: Result) -> None:
        self._here += 1
        what = f"{result.tokens_per_sec:,.0f} tok/s" if result.ok else result.status
        if result.ok and result.peak_bytes:
            what += f", {result.peak_bytes / 1e6:,.0f} MB"
        if result.status == "error":
            what += f": {result.message}"
        left = "" if self._bar is not None else f" ({self._left()})"
        line = f"{candidate.name}, {result.trial.micro_B} rows: {what}{left}"
        self.console.print(line, markup=False)

    def _progress(self) -> float:
        return (self._number + min(self._here / self._trials_each, 0.9)) / self.configurations

    def _left(self) -> str:
        done = self._progress()
        return f"{duration((time.monotonic() - self._began) * (1 - done) / done)} left" if done else "time left: ?"

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    sys.exit(main())
