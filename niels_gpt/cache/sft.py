"""Chat caches of the sources by name, and from those to batches.

Two batch makers: `pack_batch` fills rows with whole conversations that do not see each other, `padded_batch` gives
every conversation a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from niels_gpt.batching import Batch, check_mix, draw_sources
from niels_gpt.cache.folder import locked
from niels_gpt.cache.format import SftExamples, open_sft
from niels_gpt.cache.sft_build import build_primer_sft_cache, build_sft_cache, write_chats
from niels_gpt.cache.shared import Progress, fingerprint, open_sources, renormalised, up_to_date, warn
from niels_gpt.data.primer_source import find_jsonl
from niels_gpt.data.registry import get_source
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer

_MAX_REDRAWS = 100


# Building


def build_sft(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    seed: int | None = None,
    val_frac: float | None = None,
    t_max: int | None = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's chats; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. `seed` and `val_frac`
    split sources that do not split themselves; `t_max`, the longest conversation in tokens, is for primer alone. What
    is not given is that of `data.primer` for primer, else that of `data.caches`.
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
    chosen = settings.data.primer if entry.name == "primer" else settings.data.caches
    seed = chosen.seed if seed is None else seed
    val_frac = chosen.val_frac if val_frac is None else val_frac
    if entry.name == "primer":
        return build_primer_sft_cache(
            find_jsonl(settings),
            folder,
            tokenizer=tokenizer,
            seed=seed,
            val_frac=val_frac,
            t_max=settings.data.primer.t_max if t_max is None else t_max,
            strict=strict,
            progress=progress,
        )
    description = entry.describe(settings, "sft")
    options = {"strict": strict} if entry.splits_chats else {"strict": strict, "seed": seed, "val_frac": val_frac}
    wanted = fingerprint(description, **options)
    with locked(folder):
        if kept := up_to_date(folder, wanted, tokenizer):
            return kept
        known = {key: value for key, value in description.items() if key != "files"}
        meta = {"dataset_config": None, **known, "seed": seed, "source_fingerprint": wanted}
        if not entry.splits_chats:
            examples = [chat.messages for chat in entry.chats(settings, "all")]
            return build_sft_cache(
                examples,
                folder,
                tokenizer=tokenizer,
                seed=seed,
                val_frac=val_frac,
                strict=strict,
                meta=meta,
                progress=progress,
            )
        splits = {split: [chat.messages for chat in entry.chats(settings, split)] for split in ("val", "train")}
        return write_chats(folder, splits, tokenizer, {**meta, "val_frac": None}, strict=strict, progress=progress)


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


# Batches


def pack_batch(
    sources: Mapping[str, SftExamples],
    p: Mapping[str, float],
    *,
    B: int,
    T: int,
    generator: torch.Generator,
    eot_id: int,
) -> Batch:
    """B rows of whole conversations: x, y and segment (B, T).

    A row takes conversations, drawn by weight and then uniformly, until the next one does not fit; the rest is padding.
    Only a row's first can be longer than the row: its last T+1 tokens are kept. `segment` numbers the conversations of
    a row, the padding last; y is -100 at the end of each, so nothing predicts across. A batch without any target is
    drawn again.
    """
    check_mix(list(sources), p)
    return _until_supervised(lambda: [_packed_row(sources, p, T, generator, eot_id) for _ in range(B)])


def padded_batch(
    sources: Mapping[str, SftExamples],
    p: Mapping[str, float],
    *,
    B: int,
    T: int,
    generator: torch.Generator,
    eot_id: int,
) -> Batch:
    """B rows of one conversation each, padded with the end id: x, y (B, T), no segment.

    Draws as the published trainer does: all sources by weight, then an example of each. Of conversations longer than
    T+1 tokens the last ones are kept. A batch without any target is drawn again.
    """
    check_mix(list(sources), p)

    def rows() -> list[np.ndarray]:
        drawn = (_draw_example(sources[name], generator) for name in draw_sources(p, B, generator))
        return [_row([example], T, eot_id) for example in drawn]

    batch = _until_supervised(rows)
    return Batch(batch.x, batch.y)


def _until_supervised(draw_rows: Callable[[], list[np.ndarray]]) -> Batch:
    for _ in range(_MAX_REDRAWS):
        ids, labels, segment = torch.from_numpy(np.stack(draw_rows())).unbind(1)
        if (labels[:, 1:] != IGNORED).any():
            return Batch(ids[:, :-1].contiguous(), labels[:, 1:].contiguous(), segment[:, :-1].contiguous())
    raise ValueError(
        f"{_MAX_REDRAWS} batches in a row had no assistant token to learn from; "
        "raise T, so that the ends of long conversations fit, or add conversations"
    )


def _packed_row(
    sources: Mapping[str, SftExamples], p: Mapping[str, float], T: int, generator: torch.Generator, eot_id: int
) -> np.ndarray:
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    room = T + 1
    while room > 0:
        example = _draw_example(sources[draw_sources(p, 1, generator)[0]], generator)
        if chosen and len(example[0]) > room:
            break
        chosen.append(example)
        room -= len(example[0])
    return _row(chosen, T, eot_id)


def _draw_example(source: SftExamples, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    return source.example(int(torch.randint(len(source), (1,), generator=generator)))


def _row(examples: Sequence[tuple[np.ndarray, np.ndarray]], T: int, eot_id: int) -> np.ndarray:
    """(3, T+1) int64: ids, labels and segments of the examples one after another, then padding."""
    row = np.empty((3, T + 1), dtype=np.int64)
    row[:] = [[eot_id], [IGNORED], [len(examples)]]
    start = 0
    for number, (ids, labels) in enumerate(examples):
        ids, labels = ids[-(T + 1) :], labels[-(T + 1) :]
        row[:, start : start + len(ids)] = ids, labels, np.full_like(ids, number)
        row[1, start] = IGNORED  # the target of the token before it, which belongs to another conversation
        start += len(ids)
    return row
