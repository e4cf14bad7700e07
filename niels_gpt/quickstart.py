"""`niels-gpt quickstart`: tokenizer, caches, pretraining, fine-tuning, summary, chat; in one folder, offline.

    niels-gpt quickstart [--minutes 5] [--seed 42] [--out DIR] [--no-chat]

What a second run in the same folder finds unchanged is used again; a training run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from niels_gpt import checkpoint as ckpt
from niels_gpt import paths
from niels_gpt.chat import build_options, run_chat, system_prompt
from niels_gpt.command import exit_status
from niels_gpt.console import OutputConsole, wide_console
from niels_gpt.device import get_device
from niels_gpt.plan.recipe import seeded, tuned, with_minutes
from niels_gpt.settings import PHASES, Settings, validate_overrides
from niels_gpt.summary import Summary, measure, show
from niels_gpt.train.lineage import pretrained_model
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.prepare import compile_kernels, make_caches, make_tokenizer, set_other_runs_aside, stage
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.sft import run_sft

SMALLEST_BUDGET = 0.05  # minutes


@dataclass(frozen=True)
class Plan:
    """One quickstart: its settings (both phases), as the overrides they come from."""

    overrides: dict[str, Any]
    settings: Settings
    seed: int


def make_plan(minutes: float, seed: int) -> Plan:
    """The shipped quickstart settings with this budget and seed; paths are relative to the current folder."""
    overrides = with_minutes(seeded(tuned(), seed), minutes)
    return Plan(overrides, validate_overrides(overrides), seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="niels-gpt quickstart", description="Train a small chat model, offline.")
    parser.add_argument("--minutes", type=float, default=5.0, help="training budget (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=42, help="of everything random (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for all that is made (default: here)")
    parser.add_argument("--no-chat", action="store_true", help="do not open the chat at the end")
    args = parser.parse_args(argv)
    if not SMALLEST_BUDGET <= args.minutes <= 100_000:
        parser.error(f"--minutes must be between {SMALLEST_BUDGET} and 100000")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be between 0 and 2^63 - 1")
    return exit_status(
        lambda: _run(args),
        go_on="run the same command again to go on",
        expected=(ValueError, OSError, RuntimeError),
    )


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    console = OutputConsole()
    plan = make_plan(args.minutes, args.seed)
    console.print(f"niels-gpt quickstart: {args.minutes:g} minutes of training in {Path.cwd()}", markup=False)
    tokenizer = stage(console, "1/5 tokenizer", lambda say: make_tokenizer(plan.settings, plan.seed, say))
    stage(console, "2/5 caches", lambda say: make_caches(plan.settings, tokenizer, say))
    compile_kernels(plan.settings, None, console)
    began = time.perf_counter()
    trained = train_both(plan, console)
    seconds = time.perf_counter() - began
    best = paths.CHECKPOINT_DIR / "best.pt"
    loaded = ckpt.load_model(best, device=get_device())
    system = system_prompt()
    summary: Summary = stage(
        console, "5/5 summary", lambda say: measure(loaded, pretrained_model(), plan.settings, trained, system, say)
    )
    show(wide_console(), summary, seconds, out)
    if not args.no_chat and sys.stdin.isatty() and sys.stdout.isatty():
        console.print("\nChat with it (/help for commands, /exit to leave):", markup=False)
        return run_chat(loaded, build_options(loaded.settings, system))
    return 0


@only_training_here()
def train_both(plan: Plan, console: Console) -> dict[str, dict[str, Any]]:
    """Pretrain, then fine-tune from the best; a finished or interrupted run with the same settings is taken up."""
    set_other_runs_aside(plan.settings, console)
    budgets = {p: getattr(plan.settings.training, p).minutes for p in PHASES}
    console.print(f"[3/5 pretraining] {budgets['pretrain']:.2f} minutes", markup=False)
    pretrain = run_pretrain(plan.overrides)
    console.print(f"[4/5 fine-tuning] {budgets['sft']:.2f} minutes", markup=False)
    sft = run_sft(plan.overrides, init_model_path=pretrained_model())
    return {"pretrain": pretrain, "sft": sft}


if __name__ == "__main__":
    sys.exit(main())
