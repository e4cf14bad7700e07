"""`python tools/bench_trial.py --trial JSON`: measure one trial in this process, and print one line of JSON.

    python tools/bench_trial.py --trial '{"device": "cpu", "micro_B": 4, "model": {"V": 512, "T": 64, "C": 64, "L": 2,
        "H": 2, "d_ff": 192, "dropout": 0.1, "rope_theta": 10000.0}}'

A trial also takes amp, amp_dtype, activation_checkpointing, steps_warmup, steps_measure, seed, and settings (overrides
of all other settings). Exit code 0 for the statuses ok and oom, 1 for an error, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from niels_gpt.bench.trial import Result, Trial, row_of
from niels_gpt.bench.workload import measure
from niels_gpt.files import read_json

WATCH_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench_trial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--trial", metavar="JSON", help="the trial")
    given.add_argument("--trial_json", "--trial-json", metavar="FILE", help="a file with the trial")
    args = parser.parse_args(argv)
    try:
        trial = Trial.from_dict(_object(args))
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    volunteer()
    with redirect_stdout(sys.stderr):  # whatever a library says, stdout has the result alone
        try:
            result = measure(trial)
        except (ValueError, RuntimeError, OSError) as error:
            result = Result(trial, "error", message=str(error))
    print(json.dumps(row_of(result)))
    return 1 if result.status == "error" else 0


def _object(args: argparse.Namespace) -> dict[str, Any]:
    try:
        found = read_json(Path(args.trial_json)) if args.trial_json else json.loads(args.trial)
    except json.JSONDecodeError as error:
        raise ValueError(f"--trial is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("a trial is a JSON object")
    return found


def volunteer() -> None:
    """End with the program that started this one, and be the first to go when the system runs out of memory."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # Linux; any process may raise its own
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
