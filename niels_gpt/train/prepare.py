"""What training needs before it starts: tokenizer, caches, and checkpoints of other runs out of the way

What is there already and still right is used again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from niels_gpt import checkpoint as ckpt
from niels_gpt import files, paths
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.sft import build_sft
from niels_gpt.data.registry import forget_text, get_source
from niels_gpt.device import resolve_device, return_freed_memory
from niels_gpt.infer.native import decoder
from niels_gpt.model.native import ops as native
from niels_gpt.settings import PHASES, Settings
from niels_gpt.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from niels_gpt.tokenizer.corpus import mix_corpora
from niels_gpt.train import lineage
from niels_gpt.train.sft import sft_fingerprint
from niels_gpt.train.start import fingerprint

Say = Callable[[str], None]
T = TypeVar("T")


def stage(console: Console, title: str, work: Callable[[Say], T]) -> T:
    """Run one stage with a spinner and elapsed time on a terminal, and one line that says what came of it."""
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


def compile_kernels(settings: Settings, device: str | None, console: Console) -> None:
    """Compile now what a CPU trains and writes with, once per machine: not in the time for training."""
    if settings.training.native_kernels and resolve_device(device) == "cpu":
        with console.status("compiling kernels, once per machine"):
            native.missing()
            decoder.missing()


def make_tokenizer(settings: Settings, seed: int, say: Say) -> SentencePieceTokenizer:
    """Train the tokenizer on documents of the mix, 50 MB at most, or use the one that is there and still right."""
    path = Path(settings.tokenizer.model_path)
    meta_path = path.with_name("tokenizer_meta.json")
    sources = {name: get_source(name).describe(settings, "pretrain") for name in sorted(settings.data.mix_pretrain)}
    wanted = {"sources": sources, "asked_vocab_size": settings.tokenizer.vocab_size}
    if path.is_file():
        meta = _record_of_tokenizer(meta_path)
        if {key: meta.get(key) for key in wanted} == wanted and meta.get("tokenizer_sha256") == files.sha256_file(path):
            say(f"reused {path}")
            return load_tokenizer(path)
    say("reading text")
    texts = (text for corpus in mix_corpora(settings) for text in corpus.unchecked())
    train_tokenizer(texts, path.parent, vocab_size=settings.tokenizer.vocab_size, seed=seed, sources=wanted)
    tokenizer = load_tokenizer(path)
    say(f"{tokenizer.vocab_size:,} pieces, in {path}")
    return tokenizer


def _record_of_tokenizer(path: Path) -> dict[str, Any]:
    """How a tokenizer was made; {} where that cannot be read, so that it is made anew."""
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def make_caches(settings: Settings, tokenizer: SentencePieceTokenizer, say: Say) -> None:
    """Build the token caches of both phases; each is kept if data, split and tokenizer are the same.

    What the text took of memory is given back: a run reads caches only, and may last for hours.
    """
    caches, reused, tokens = settings.data.caches, 0, 0
    for name in sorted(settings.data.mix_pretrain):
        say(f"{name} text")
        meta = build_pretrain(settings, tokenizer, name, root=caches.pretrain_token_cache)
        reused += bool(meta.get("reused"))
        tokens += meta["train_tokens"]
    for name in sorted(settings.data.mix_sft):
        say(f"{name} chats")
        meta = build_sft(settings, tokenizer, name, root=caches.sft_token_cache)
        reused += bool(meta.get("reused"))
    forget_text()
    return_freed_memory()
    total = len(settings.data.mix_pretrain) + len(settings.data.mix_sft)
    kept = f", {reused} of {total} caches reused" if reused else ""
    say(f"{tokens:,} tokens to pretrain on{kept}")


def _data(settings: Settings, phase: str | None) -> dict[str, str]:
    """What a phase would learn from now."""
    if phase == "sft":
        return sft_fingerprint(settings, settings.data.mix_sft)
    return fingerprint(settings.data.caches.pretrain_token_cache, settings.data.mix_pretrain)


def set_other_runs_aside(settings: Settings, console: Console, *, any_budget: bool = False) -> None:
    """Move checkpoints of other settings or data away; those of this run stay, to be gone on with.

    any_budget: a run with another time budget is the same run.
    """
    if not _is_same_run(settings, any_budget) and paths.CHECKPOINT_DIR.is_dir():
        aside = paths.CHECKPOINT_DIR.with_name(f"checkpoints-{datetime.now():%Y%m%d-%H%M%S}")
        shutil.move(paths.CHECKPOINT_DIR, aside)
        console.print(f"checkpoints of other settings or data moved to {aside}", markup=False)


def _is_same_run(settings: Settings, any_budget: bool) -> bool:
    """Whether the checkpoints here were made with these settings from these caches, and may be gone on with."""
    found = [path for phase in PHASES if (path := ckpt.newest_good(phase)) is not None]
    wanted = settings.model_dump(mode="json")
    for path in found:
        record = lineage.read(path).resume
        made = record.get("settings") or {}
        if any_budget and made:
            made = _without_budget(made)
        if made != (_without_budget(wanted) if any_budget else wanted):
            return False
        if record.get("data") != _data(settings, record.get("phase")):
            return False
    return bool(found)


def _without_budget(settings: dict[str, Any]) -> dict[str, Any]:
    training = settings["training"]
    phases = {name: {**training[name], "minutes": None} for name in PHASES}
    return {**settings, "training": {**training, **phases}}
