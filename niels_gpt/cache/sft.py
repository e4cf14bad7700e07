"""Chat caches: from conversations to labelled tokens, and from those to batches.

Two builders, as in the published caches: the generic one for chats from anywhere, and that of primer.jsonl, which
truncates from the left. Two batch makers: `pack_batch` fills rows with whole conversations that do not see each other,
`padded_batch` gives every conversation a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from niels_gpt.batching import Batch, check_mix, draw_sources
from niels_gpt.cache.format import SftExamples, SftWriter, open_sft, writing_sft
from niels_gpt.cache.shared import (
    Progress,
    fingerprint,
    open_sources,
    renormalised,
    tokenizer_meta,
    up_to_date,
    warn,
)
from niels_gpt.chat_format import AnyMessage, render
from niels_gpt.data.primer import iter_chat_jsonl_lenient
from niels_gpt.data.primer_source import find_jsonl, val_indices
from niels_gpt.data.registry import get_source
from niels_gpt.data.roam import split_indices
from niels_gpt.data.types import ROLES, Message
from niels_gpt.files import sha256_file
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import assert_no_special_collision, find_special_collision
from niels_gpt.tokenizer import Tokenizer

_MAX_REDRAWS = 100

Example = Sequence[AnyMessage]


# Building


def build_sft(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    seed: int,
    val_frac: float,
    t_max: int,
    strict: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's chats; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. `seed` and `val_frac`
    split sources that do not split themselves; `t_max`, the longest conversation in tokens, is for primer alone.
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
    if entry.name == "primer":
        return build_primer_sft_cache(
            find_jsonl(settings),
            folder,
            tokenizer=tokenizer,
            seed=seed,
            val_frac=val_frac,
            t_max=t_max,
            strict=strict,
            progress=progress,
        )
    description = entry.describe(settings, "sft")
    options = {"strict": strict} if entry.splits_chats else {"strict": strict, "seed": seed, "val_frac": val_frac}
    wanted = fingerprint(description, **options)
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
    return _write(folder, splits, tokenizer, {**meta, "val_frac": None}, strict=strict, progress=progress)


def build_sft_cache(
    examples: Sequence[Example],
    out_dir: str | Path,
    *,
    tokenizer: Tokenizer,
    seed: int,
    val_frac: float,
    strict: bool = False,
    meta: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a chat cache in `out_dir` from conversations, split by a random permutation; returns its meta.json.

    Val is the first max(1, n*val_frac) of the permutation (none of a single example); both splits keep the given order.
    Malformed conversations are dropped and counted after the split; so are those with a special token literal, which
    `strict` makes an error.
    """
    train, val = split_indices(len(examples), val_frac, seed)
    splits = {split: [examples[i] for i in sorted(chosen)] for split, chosen in (("val", val), ("train", train))}
    about = {
        "dataset_name": None,
        "dataset_config": None,
        **(meta or {}),
        "split_rule": f"torch.randperm val_frac={val_frac}",
        "seed": seed,
        "val_frac": val_frac,
    }
    return _write(Path(out_dir), splits, tokenizer, about, strict=strict, progress=progress)


def build_primer_sft_cache(
    jsonl_path: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: Tokenizer,
    seed: int,
    val_frac: float,
    t_max: int,
    strict: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a chat cache in `out_dir` from a chat JSONL file; returns its meta.json.

    Conversations longer than `t_max` tokens lose their oldest ones. Val is int(n*val_frac) examples, possibly none.
    Examples without an assistant message are dropped and counted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no example in it; or, if `strict`, a malformed line or a special token literal in one.
    """
    path = Path(jsonl_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; make it with tools/convert_primer_txt_to_jsonl.py")
    if not 0 <= val_frac < 1 or t_max < 2:
        raise ValueError(f"val_frac must be in [0, 1) and t_max at least 2, got val_frac={val_frac} and t_max={t_max}")
    wanted = fingerprint({"sha256": sha256_file(path)}, seed=seed, val_frac=val_frac, t_max=t_max, strict=strict)
    if kept := up_to_date(Path(out_dir), wanted, tokenizer):
        return kept
    examples: list[Example] = []
    malformed = 0
    for number, messages, reason in iter_chat_jsonl_lenient(path):
        if messages is None and reason and not reason.startswith("no assistant message"):
            if strict:
                raise ValueError(f"{path}: line {number}: {reason}")
            malformed += 1
            continue
        examples.append(messages or [])
    if not examples:
        raise ValueError(f"{path}: no example in it; each line must be an object such as {{'messages': [...]}}")
    held_out = val_indices(len(examples), val_frac, seed)
    splits = {
        "val": [messages for i, messages in enumerate(examples) if i in held_out],
        "train": [messages for i, messages in enumerate(examples) if i not in held_out],
    }
    meta = {
        "source": "primer",
        "dataset_name": "primer",
        "dataset_config": None,
        "split_rule": f"by example, val_frac={val_frac}, seed={seed}",
        "seed": seed,
        "val_frac": val_frac,
        "T_max": t_max,
        "source_fingerprint": wanted,
    }
    dropped = Counter({"malformed": malformed})
    return _write(
        Path(out_dir), splits, tokenizer, meta, strict=strict, t_max=t_max, dropped=dropped, progress=progress
    )


def _write(
    folder: Path,
    splits: Mapping[str, Sequence[Example]],
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    *,
    strict: bool,
    t_max: int | None = None,
    dropped: Counter[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    dropped = Counter() if dropped is None else dropped
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    meta |= tokenizer_meta(tokenizer)
    with writing_sft(folder, meta, vocab_size=tokenizer.vocab_size) as writer:
        for split, examples in splits.items():
            for n, messages in enumerate(examples):
                where = f"{folder.name}/{split}"
                reason = _reject(messages, strict, where, n) or _add(writer, split, messages, tokenizer, sizes, t_max)
                if reason:
                    dropped[reason] += 1
                if progress:
                    progress(split, n + 1)
        kept = writer.n_examples("train")
        if not kept:
            raise ValueError(f"no conversation to train on is left for {folder.name}; dropped: {dict(dropped)}")
        meta["dropped"] = {reason: count for reason, count in sorted(dropped.items()) if count}
        meta["dropped_collisions"] = dropped["collision"]
        meta["dropped_malformed_examples"] = sum(dropped.values()) - dropped["collision"]
    return writer.meta


def _reject(messages: Example, strict: bool, where: str, index: int) -> str | None:
    """Why a conversation cannot be used, None if it can; ValueError for a special token literal if `strict`."""
    fields = [(m.role, m.content) if isinstance(m, Message) else (m.get("role"), m.get("content")) for m in messages]
    if any(role not in ROLES or not isinstance(content, str) for role, content in fields):
        return "malformed"
    if not any(role == "assistant" for role, _ in fields):
        return "no_assistant"
    for i, (_, content) in enumerate(fields):
        if strict:
            assert_no_special_collision(str(content), dataset=where, doc_index=index, field=f"messages[{i}].content")
        elif find_special_collision(str(content)):
            return "collision"
    return None


def _add(
    writer: SftWriter, split: str, messages: Example, tokenizer: Tokenizer, sizes: np.ndarray, t_max: int | None
) -> str | None:
    """Write one conversation; returns why it was dropped, if it was. `sizes[i]` is the length of id i in bytes."""
    ids, labels = render(tokenizer, messages)
    if t_max is not None:
        ids, labels = ids[-t_max:], labels[-t_max:]
        if len(ids) < 2:
            return "too_short"
    targets = np.array(labels)
    writer.add(split, ids, labels, int(sizes[targets[targets != IGNORED]].sum()))
    return None


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
