"""`niels-gpt plan`: hours in, the best model they can make here, its settings and what it will take

    niels-gpt plan --hours 8 [--device cpu|mps|cuda] [--sources chitchat,text] [--json] [--out plan.json]

Then `niels-gpt train --plan plan.json`. It measures for a minute at most. Exit code 2 for wrong usage, 1 if there is no
plan.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from rich.console import Console

from niels_gpt import files
from niels_gpt.command import exit_status
from niels_gpt.console import wide_console
from niels_gpt.plan.planning import LONGEST, SHORTEST, make_plan
from niels_gpt.plan.table import show
from niels_gpt.train.prepare import stage


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if not SHORTEST <= args.hours <= LONGEST:
        parser.error(f"--hours must be between {SHORTEST:g} and {LONGEST:g}")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be between 0 and 2^63 - 1")
    if args.memory_gb is not None and not 0 < args.memory_gb < math.inf:
        parser.error("--memory-gb must be above 0, and a number")
    if args.sources == "":
        parser.error("--sources must name at least one")
    if args.out is not None and Path(args.out).is_dir():
        parser.error(f"--out {args.out} is a folder; give a file, such as {Path(args.out) / 'plan.json'}")
    expected = (ValueError, OSError, RuntimeError)
    return exit_status(lambda: _run(args), stopped="interrupted; nothing was written", expected=expected)


def _run(args: argparse.Namespace) -> int:
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    plan = stage(
        said,
        "planning",
        lambda say: make_plan(
            args.hours,
            device=args.device,
            sources=args.sources.split(",") if args.sources else None,
            seed=args.seed,
            memory_bytes=None if args.memory_gb is None else int(args.memory_gb * 1e9),
            folder=Path.cwd(),
            say=say,
        ),
    )
    record = plan.record()
    console = wide_console()
    if args.json:
        print(json.dumps(record, indent=2))
    else:
        show(console, plan, plan.settings.plan.shown)
    if args.out is not None:
        files.write_json(Path(args.out), record)
    if args.json:
        return 0
    if args.out is not None:
        console.print(f"\nwritten to {args.out}; run it with: niels-gpt train --plan {args.out}", markup=False)
    else:
        console.print("\nkeep it with --out plan.json; then: niels-gpt train --plan plan.json", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="niels-gpt plan", description="What this machine can make in so many hours.")
    parser.add_argument("--hours", type=float, required=True, help=f"{SHORTEST:g} to {LONGEST:g}, everything included")
    parser.add_argument("--device", help="cpu, mps or cuda; by default the best there is")
    parser.add_argument("--sources", metavar="A,B", help="text to learn from (default: small talk and primer, offline)")
    parser.add_argument("--seed", type=int, default=42, help="of everything random (default: %(default)s)")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="plan for so much memory (default: what is free)")
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument("--out", metavar="PATH", help="write the plan here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
