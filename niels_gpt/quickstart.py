"""`niels-gpt quickstart`: tokenizer, caches, pretraining, fine-tuning, summary, chat; in one folder, offline.

    niels-gpt quickstart [--minutes 5] [--seed 42] [--out DIR] [--no-chat]

What a second run in the same folder finds unchanged is used again; a training run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from niels_gpt import checkpoint as ckpt
from niels_gpt import files, paths
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.sft import build_sft
from niels_gpt.chat import build_options, run_chat, system_prompt
from niels_gpt.data.registry import get_source
from niels_gpt.device import get_device
from niels_gpt.settings import Settings, load_overrides, validate_overrides
from niels_gpt.summary import Summary, measure, show
from niels_gpt.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from niels_gpt.train.loop import Interrupted
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.sft import run_sft, sft_fingerprint
from niels_gpt.train.start import fingerprint

CONFIG = "configs/quickstart.json"
SFT_SHARE = 0.6  # of the training budget; tuned in docs/log.md
SMALLEST_BUDGET = 0.05  # minutes


@dataclass(frozen=True)
class Plan:
    """One quickstart: its settings (both phases), as the overrides they come from."""

    overrides: dict[str, Any]
    settings: Settings
    seed: int


def make_plan(minutes: float, seed: int) -> Plan:
    """The shipped quickstart settings with this budget and seed; paths are relative to the current folder."""
    overrides = load_overrides(paths.shipped(CONFIG))
    for phase, share in (("pretrain", 1 - SFT_SHARE), ("sft", SFT_SHARE)):
        overrides["training"][phase] |= {"minutes": minutes * share, "seed": seed}
    for source, key in (("chitchat", "split_seed"), ("primer", "seed")):
        overrides["data"][source] = {**overrides["data"].get(source, {}), key: seed}
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
    try:
        return _run(args)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        files.discard_output()
        print("the output was closed; run the same command again to go on", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {files.explained(error)}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    console = Console(highlight=False, soft_wrap=True)
    plan = make_plan(args.minutes, args.seed)
    console.print(f"niels-gpt quickstart: {args.minutes:g} minutes of training in {Path.cwd()}", markup=False)
    tokenizer = _step(console, "1/5 tokenizer", lambda say: make_tokenizer(plan, say))
    _step(console, "2/5 caches", lambda say: make_caches(plan, tokenizer, say))
    began = time.perf_counter()
    trained = train_both(plan, console)
    seconds = time.perf_counter() - began
    best = paths.CHECKPOINT_DIR / "best.pt"
    loaded = ckpt.load_model(best, device=get_device())
    system = system_prompt()
    summary: Summary = _step(console, "5/5 summary", lambda say: measure(loaded, plan.settings, trained, system, say))
    show(console, summary, seconds)
    if not args.no_chat and sys.stdin.isatty() and sys.stdout.isatty():
        console.print("\nChat with it (/help for commands, /exit to leave):", markup=False)
        return run_chat(loaded, build_options(loaded.settings, system))
    return 0


Say = Callable[[str], None]


def _step(console: Console, title: str, work: Callable[[Say], Any]) -> Any:
    """Run one step with a spinner and elapsed time on a terminal, and one line that says what came of it."""
    began = time.perf_counter()
    outcome: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def say(text: str) -> None:
            outcome[:] = [text]
            bar.update(task, description=f"{title}: {text}")

        result = work(say)
    console.print(f"[{title}] {outcome[0] if outcome else 'done'} ({time.perf_counter() - began:.1f} s)", markup=False)
    return result


def make_tokenizer(plan: Plan, say: Say) -> SentencePieceTokenizer:
    """Train the tokenizer on the training documents of the mix, or use the one that is there and still right."""
    settings = plan.settings
    path = Path(settings.tokenizer.model_path)
    meta_path = path.with_name("tokenizer_meta.json")
    sources = {name: get_source(name).describe(settings, "pretrain") for name in sorted(settings.data.mix_pretrain)}
    wanted = {"sources": sources, "asked_vocab_size": settings.tokenizer.vocab_size}
    if path.is_file() and meta_path.is_file():
        meta = files.read_json(meta_path)
        if {key: meta.get(key) for key in wanted} == wanted and meta.get("tokenizer_sha256") == files.sha256_file(path):
            say(f"reused {path}")
            return load_tokenizer(path)
    say("reading text")
    texts = (document.text for name in sources for document in (get_source(name).documents or _none)(settings, "train"))
    train_tokenizer(texts, path.parent, vocab_size=settings.tokenizer.vocab_size, seed=plan.seed, sources=wanted)
    tokenizer = load_tokenizer(path)
    say(f"{tokenizer.vocab_size:,} pieces, in {path}")
    return tokenizer


def _none(settings: Settings, split: str) -> Any:
    return iter(())


def make_caches(plan: Plan, tokenizer: SentencePieceTokenizer, say: Say) -> None:
    """Build the token caches of both phases; each is kept if data, split and tokenizer are the same."""
    settings = plan.settings
    caches, reused, tokens = settings.data.caches, 0, 0
    for name in sorted(settings.data.mix_pretrain):
        say(f"{name} text")
        meta = build_pretrain(settings, tokenizer, name, root=caches.pretrain_token_cache, seed=plan.seed)
        reused += bool(meta.get("reused"))
        tokens += meta["train_tokens"]
    for name in sorted(settings.data.mix_sft):
        say(f"{name} chats")
        meta = build_sft(settings, tokenizer, name, root=caches.sft_token_cache, seed=plan.seed)
        reused += bool(meta.get("reused"))
    total = len(settings.data.mix_pretrain) + len(settings.data.mix_sft)
    kept = f", {reused} of {total} caches reused" if reused else ""
    say(f"{tokens:,} tokens to pretrain on{kept}")


def train_both(plan: Plan, console: Console) -> dict[str, dict[str, Any]]:
    """Pretrain, then fine-tune from the best; a finished or interrupted run with the same settings is taken up."""
    usable = _same_run(plan)
    if not usable and paths.CHECKPOINT_DIR.is_dir():
        aside = paths.CHECKPOINT_DIR.with_name(f"checkpoints-{datetime.now():%Y%m%d-%H%M%S}")
        shutil.move(paths.CHECKPOINT_DIR, aside)
        console.print(f"checkpoints of other settings or data moved to {aside}", markup=False)
    budgets = {p: getattr(plan.settings.training, p).minutes for p in ("pretrain", "sft")}
    console.print(f"[3/5 pretraining] {budgets['pretrain']:.2f} minutes", markup=False)
    pretrain = run_pretrain(plan.overrides)
    console.print(f"[4/5 fine-tuning] {budgets['sft']:.2f} minutes", markup=False)
    sft = run_sft(plan.overrides, init_model_path=ckpt.phase_paths("pretrain").best)
    return {"pretrain": pretrain, "sft": sft}


def _data(settings: Settings, phase: str | None) -> dict[str, str]:
    """What a phase would learn from now."""
    if phase == "sft":
        return sft_fingerprint(settings, settings.data.mix_sft)
    return fingerprint(settings.data.caches.pretrain_token_cache, settings.data.mix_pretrain)


def _same_run(plan: Plan) -> bool:
    """Whether the checkpoints here were made with these settings from these caches, and may be gone on with."""
    found = [path for phase in ("pretrain", "sft") if (path := ckpt.newest_good(phase)) is not None]
    wanted = plan.settings.model_dump(mode="json")
    for path in found:
        record = ckpt.load_checkpoint(path, device="cpu")["resume"] or {}
        if record.get("settings") != wanted or record.get("data") != _data(plan.settings, record.get("phase")):
            return False
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
