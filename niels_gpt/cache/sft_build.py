"""From conversations to a chat cache on disk: labelled, split, and with every drop counted.

Two builders, as in the published caches: the generic one for chats from anywhere, and that of primer.jsonl, which
truncates from the left.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt.cache.folder import locked
from niels_gpt.cache.shared import Done, Progress, fingerprint, tokenizer_meta, up_to_date, warn
from niels_gpt.cache.writing import SftWriter, writing_sft
from niels_gpt.chat_format import AnyMessage, render_batch
from niels_gpt.data.jsonl import Report
from niels_gpt.data.primer import iter_chat_jsonl_lenient
from niels_gpt.data.primer_source import val_indices
from niels_gpt.data.roam import split_indices
from niels_gpt.data.types import ROLES, Message
from niels_gpt.files import sha256_file
from niels_gpt.model.loss import IGNORED
from niels_gpt.special_tokens import assert_no_special_collision, find_special_collision
from niels_gpt.tokenizer import Tokenizer

Example = Sequence[AnyMessage]
RENDERED_AT_ONCE = 256  # conversations


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
    return write_chats(Path(out_dir), splits, tokenizer, about, strict=strict, progress=progress)


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
    path, folder = Path(jsonl_path), Path(out_dir)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; make it with tools/convert_primer_txt_to_jsonl.py")
    if not 0 <= val_frac < 1 or t_max < 2:
        raise ValueError(f"val_frac must be in [0, 1) and t_max at least 2, got val_frac={val_frac} and t_max={t_max}")
    wanted = fingerprint({"sha256": sha256_file(path)}, seed=seed, val_frac=val_frac, t_max=t_max, strict=strict)
    with locked(folder):
        if kept := up_to_date(folder, wanted, tokenizer):
            return kept
        examples, report = _read_examples(path, strict)
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
        dropped = Counter({"malformed": report.lines - len(examples)})
        return write_chats(
            folder, splits, tokenizer, meta, strict=strict, t_max=t_max, dropped=dropped, progress=progress
        )


def _read_examples(path: Path, strict: bool) -> tuple[list[Example], Report]:
    """The examples of a chat JSONL file, and what its lines were; which will be dropped, and why, goes to stderr.

    Malformed lines are no examples. One without an assistant message is, but empty, and like one with a special token
    literal it is dropped only after the split, as it was from published caches. ValueError for malformed lines and
    literals if `strict`, or if there is no example.
    """
    examples: list[Example] = []
    report = Report()
    for number, messages, problem in iter_chat_jsonl_lenient(path):
        unanswered = problem is not None and problem.startswith("no assistant message")
        literal = any(find_special_collision(message["content"]) for message in messages or [])
        reason = "special token literal in a message" if literal else problem
        if strict and reason and not unanswered:
            raise ValueError(f"{path}: line {number}: {reason}")
        report.lines += 1
        if reason:
            report.drop(reason, f"line {number}")
        if messages is not None or unanswered:
            examples.append(messages or [])
    if report.dropped:
        print(f"{path}: {report}", file=sys.stderr)
    if not examples:
        raise ValueError(f"{path}: no example in it; each line must be an object such as {{'messages': [...]}}")
    return examples, report


def write_chats(
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
    """Write conversations (split -> examples) to a cache in `folder`; returns its meta.json: `meta` and the counts.

    t_max: longer ones lose their oldest tokens. dropped: how many examples were dropped before, by reason.
    ValueError if nothing is left to train on, or for a special token literal if `strict`.
    """
    dropped = Counter() if dropped is None else dropped
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    meta |= tokenizer_meta(tokenizer)
    with writing_sft(folder, meta, vocab_size=tokenizer.vocab_size) as writer:
        for split, examples in splits.items():
            for first in range(0, len(examples), RENDERED_AT_ONCE):
                some = examples[first : first + RENDERED_AT_ONCE]
                reasons = [_reject(m, strict, f"{folder.name}/{split}", n) for n, m in enumerate(some, start=first)]
                good = [messages for messages, reason in zip(some, reasons, strict=True) if reason is None]
                reasons += [_add(writer, split, *rendered, sizes, t_max) for rendered in render_batch(tokenizer, good)]
                dropped.update(reason for reason in reasons if reason is not None)
                if progress:
                    progress(Done(split, first + len(some), of_documents=len(examples)))
        kept = writer.n_examples("train")
        if not kept:
            raise ValueError(f"no conversation to train on is left for {folder.name}{_counts(dropped)}")
        if not writer.n_examples("val") and meta.get("val_frac") != 0:
            warn(
                f"{folder.name} has no conversation for validation{_counts(dropped)}, and fine-tuning needs one of "
                f"some source; add conversations{', mend the dropped ones' * any(dropped.values())} or raise val_frac"
            )
        meta["dropped"] = {reason: count for reason, count in sorted(dropped.items()) if count}
        meta["dropped_collisions"] = dropped["collision"]
        meta["dropped_malformed_examples"] = sum(dropped.values()) - dropped["collision"]
    return writer.meta


def _counts(dropped: Counter[str]) -> str:
    """How many were dropped, in parentheses; nothing if none were."""
    shown = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count)
    return f" (dropped: {shown})" if shown else ""


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
    writer: SftWriter, split: str, ids: list[int], labels: list[int], sizes: np.ndarray, t_max: int | None
) -> str | None:
    """Write one conversation; returns why it was dropped, if it was. `sizes[i]` is the length of id i in bytes."""
    if t_max is not None:
        ids, labels = ids[-t_max:], labels[-t_max:]
        if len(ids) < 2:
            return "too_short"
    targets = np.array(labels)
    writer.add(split, ids, labels, int(sizes[targets[targets != IGNORED]].sum()))
    return None
