"""Chat caches of the sources by name: building them and opening a mix of them. `chat_rows` makes rows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from niels_gpt.cache.folder import locked
from niels_gpt.cache.format import SftExamples, open_sft
from niels_gpt.cache.sft_build import build_primer_sft_cache, build_sft_cache, write_chats
from niels_gpt.cache.shared import Progress, fingerprint, open_sources, renormalised, up_to_date, warn
from niels_gpt.data.primer_source import find_jsonl
from niels_gpt.data.registry import get_source
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer

# Building


def build_sft(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    strict: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's chats; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. Sources that do not
    split themselves are split by `seed` and `val_frac` of `data.caches`, primer by those of `data.primer`.
    `strict` makes a chat with a special token literal, or a malformed line of primer.jsonl, an error; otherwise such
    chats are dropped and counted.

    Raises:
        FileNotFoundError: the source's files are not there.
        ValueError: unknown source, no chat in it, or what `strict` forbids.
    """
    entry = get_source(source)
    if entry.chats is None:
        raise ValueError(f"the source {entry.name} has text, not chats; build it for pretrain")
    folder = Path(root) / entry.name
    how: dict[str, Any] = {"tokenizer": tokenizer, "strict": strict, "progress": progress}
    if entry.name == "primer":
        own = settings.data.primer
        how |= {"seed": own.seed, "val_frac": own.val_frac, "t_max": own.t_max}
        return build_primer_sft_cache(find_jsonl(settings), folder, **how)
    seed, val_frac = settings.data.caches.seed, settings.data.caches.val_frac
    description = entry.describe(settings, "sft")
    decided = {} if entry.splits_chats else {"seed": seed, "val_frac": val_frac}
    wanted = fingerprint(description, strict=strict, **decided)
    with locked(folder):
        if kept := up_to_date(folder, wanted, tokenizer):
            return kept
        known = {key: value for key, value in description.items() if key != "files"}
        meta = {"dataset_config": None, **known, "seed": seed, "source_fingerprint": wanted}
        if not entry.splits_chats:
            examples = [chat.messages for chat in entry.chats(settings, "all")]
            return build_sft_cache(examples, folder, seed=seed, val_frac=val_frac, meta=meta, **how)
        splits = {split: [chat.messages for chat in entry.chats(settings, split)] for split in ("val", "train")}
        return write_chats(folder, splits, meta={**meta, "val_frac": None}, **how)


# Reading


def open_mix(settings: Settings, tokenizer: Tokenizer, split: str) -> tuple[dict[str, SftExamples], dict[str, float]]:
    """The conversations of `data.mix_sft` and their weights, which sum to 1.

    Sources without conversations in this split are left out with a warning, and the weights scaled up.

    Raises:
        FileNotFoundError: caches are missing, all of them named.
        ValueError: a cache is damaged or of another tokenizer, or nothing remains.
    """
    data = settings.data

    def open_one(name: str) -> SftExamples:
        return open_sft(
            data.caches.sft_token_cache,
            name,
            split,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=settings.model.V,
            special_token_ids=tokenizer.special_token_ids(),
            allow_missing_idx=data.allow_missing_idx,
        )

    opened = open_sources(sorted(data.mix_sft), open_one)
    for name in [name for name, examples in opened.items() if not len(examples)]:
        warn(f"{name} is left out of the {split} mix: its cache holds no conversations")
        del opened[name]
    if not opened:
        raise ValueError(
            f"no source of data.mix_sft has conversations for {split}; build caches with a larger val_frac"
        )
    return opened, renormalised(data.mix_sft, list(opened))
