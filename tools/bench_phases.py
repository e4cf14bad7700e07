"""Where the wall time of a pretraining run goes: steps, data, evaluation, saving, logging, and what is left.

    python tools/bench_phases.py --config FILE [--minutes 10] [--limit 0.02] [--device cpu] [--out DIR]

Runs the real thing on the caches that the settings name (a folder in which `niels-gpt quickstart` ran has them for
configs/quickstart.json) and shows what it recorded, as `niels-gpt runs show` does for any run. The exit code is 1 if
data, evaluation, logging or saving took more than the limit. Checkpoints and logs go to --out, a temporary folder by
default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from niels_gpt import paths
from niels_gpt.command import exit_status
from niels_gpt.console import OutputConsole
from niels_gpt.settings import load_overrides
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.runs_cli import find_run, show_run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="settings whose caches exist")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the run (default: %(default)g)")
    parser.add_argument("--limit", type=float, default=0.02, help="largest share of a phase (default: %(default)g)")
    parser.add_argument("--device", choices=["cpu", "mps", "cuda"], default="cpu")
    parser.add_argument("--out", metavar="DIR", help="keep checkpoints and logs here")
    args = parser.parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    overrides = load_overrides(args.config)
    overrides.setdefault("training", {}).setdefault("pretrain", {})["minutes"] = args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(args.out or scratch)
        paths.CHECKPOINT_DIR, paths.RUNS_DIR = out / "checkpoints", out / "runs"
        run_pretrain(overrides, device=args.device, no_auto_resume=True, quiet=True)
        return show_run(OutputConsole(), find_run(None), args.limit)


if __name__ == "__main__":
    sys.exit(main())
