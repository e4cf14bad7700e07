"""Where the wall time of a pretraining run goes: steps, data, evaluation, saving, logging, and what is left.

    python tools/bench_phases.py --config FILE [--minutes 10] [--device cpu] [--out DIR] [--json FILE]

Runs the real loop on the caches that the settings name (a folder in which `niels-gpt quickstart` ran has them for
configs/quickstart.json) and times the calls it makes. Checkpoints and logs go to --out, a temporary folder by default.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from niels_gpt import paths
from niels_gpt.settings import load_overrides
from niels_gpt.train.loop import Loop
from niels_gpt.train.pretrain import pretrain_job
from niels_gpt.train.report import Reporter
from niels_gpt.train.start import start_phase

TARGET = 0.02  # of the wall time, for each phase that is not the step itself
METHODS = {"evaluate": "evaluation", "_save": "saving", "train_step": "step and data"}


class Clock:
    """Seconds per phase, of calls it was put around."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def around(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[phase] += time.perf_counter() - began
                self.calls[phase] += 1

        return timed


def timed_run(overrides: Mapping[str, Any], device: str) -> tuple[Clock, float]:
    """One run of these settings, and its wall time in seconds from the first step to the last save."""
    clock = Clock()
    start = start_phase("pretrain", overrides, device=device, resume_path=None, no_auto_resume=True)
    job = pretrain_job(start)
    job = replace(job, next_batch=clock.around("data", job.next_batch))
    reporter = Reporter("pretrain", start.resolved.run_id)
    for name in ("step", "evaluated"):
        setattr(reporter, name, clock.around("logging", getattr(reporter, name)))
    loop = Loop(job, device=start.device, reporter=reporter, resume=None, init=None)
    for name, phase in METHODS.items():
        setattr(loop, name, clock.around(phase, getattr(loop, name)))
    began = time.perf_counter()
    try:
        loop.run()
    finally:
        reporter.close()
    return clock, time.perf_counter() - began


def shares(clock: Clock, wall: float) -> dict[str, float]:
    """Share of the wall time of each phase; they add up to 1. What evaluation logs counts as evaluation."""
    seconds = {name: clock.seconds[name] for name in ("data", "evaluation", "saving", "logging")}
    seconds = {"step": clock.seconds["step and data"] - clock.seconds["data"]} | seconds
    return {name: value / wall for name, value in seconds.items()} | {"rest": 1 - sum(seconds.values()) / wall}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="settings whose caches exist")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the run (default: %(default)g)")
    parser.add_argument("--device", choices=["cpu", "mps", "cuda"], default="cpu")
    parser.add_argument("--out", metavar="DIR", help="keep checkpoints and logs here")
    parser.add_argument("--json", metavar="FILE", help="write the shares here as well")
    args = parser.parse_args(argv)
    try:
        overrides = load_overrides(args.config)
        phase = overrides.setdefault("training", {}).setdefault("pretrain", {})
        phase["minutes"] = args.minutes
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(args.out or scratch)
            paths.CHECKPOINT_DIR, paths.RUNS_DIR = out / "checkpoints", out / "runs"
            clock, wall = timed_run(overrides, args.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = shares(clock, wall)
    print(f"\n{clock.calls['step and data']} steps in {wall:.1f} s\n")
    print("| phase | share of wall time | target |\n|---|---|---|")
    for name, share in found.items():
        print(f"| {name} | {share:.2%} | {'' if name == 'step' else f'at most {TARGET:.0%}'} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"wall_s": wall, "shares": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
