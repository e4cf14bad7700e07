"""What makes a pretraining cache, however its documents are encoded: which documents, in which order, how many.

`pretrain.build_pretrain` encodes on one machine, `scale` on many; both make a `CachePlan` and fill the writer that
`run` opens, so they make the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from niels_gpt.cache.encode import Block
from niels_gpt.cache.folder import locked
from niels_gpt.cache.shared import BUILD_VERSION, Done, Progress, fingerprint, tokenizer_meta, up_to_date
from niels_gpt.cache.writing import PretrainWriter, writing_pretrain
from niels_gpt.data.registry import Source, get_source
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer

STREAM = "stream"  # the part of a source that is one stream, where others have "val" and "train"


@dataclass(frozen=True)
class CachePlan:
    """Everything that decides the bytes of a pretraining cache, but for the documents and the tokenizer themselves."""

    source: Source
    folder: Path
    seed: int
    shard_bytes: int
    separator: int | None
    budgets: dict[str, int]  # tokens of val and train; empty where the source has splits
    buffer_size: int | None  # documents of a stream that are shuffled at a time
    fingerprint: str
    meta: dict[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the source, in the order in which they are written."""
        return (STREAM,) if self.budgets else ("val", "train")

    def texts(self, settings: Settings, part: str) -> Iterator[str]:
        """The texts of a part, in the order in which they are written."""
        if part == STREAM:
            assert self.source.stream is not None
            texts = (document.text for document in self.source.stream(settings))
            return shuffled(texts, self.buffer_size, self.seed) if self.buffer_size else texts
        assert self.source.documents is not None
        return (document.text for document in self.source.documents(settings, part))


def plan_cache(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
) -> CachePlan:
    """The plan of ROOT/SOURCE; a budget that is not given is that of `data.caches`. Errors as for `build_pretrain`."""
    entry, chosen = get_source(source), settings.data.caches
    if entry.documents is None and entry.stream is None:
        raise ValueError(f"the source {entry.name} has chats, not text; build it for sft")
    seed, shard_bytes = chosen.seed, chosen.shard_bytes
    budgets: dict[str, int] = {}
    buffer_size = None
    if entry.stream is not None:
        budgets["val"] = chosen.val_tokens if val_tokens is None else val_tokens
        budgets["train"] = chosen.train_tokens if train_tokens is None else train_tokens
        if budgets["val"] < 0 or budgets["train"] < 1:
            raise ValueError(f"a budget must be at least 1 token to train on and 0 to validate on, got {budgets}")
        own = getattr(settings.data, entry.name, None)
        if getattr(own, "shuffle", True):  # a source of large documents has a smaller buffer of its own
            buffer_size = getattr(own, "shuffle_buffer", settings.reproducibility.dataset_shuffle_buffer_size)
    separator = tokenizer.eot_id if entry.ends_documents else None
    description = entry.describe(settings, "pretrain")
    options = {"seed": seed, "shard_bytes": shard_bytes, "separator": separator, "ends": entry.ends_documents}
    wanted = fingerprint(description, **options, budgets=budgets, shuffle_buffer=buffer_size)
    meta = {
        "dataset_config": None,
        "streaming": bool(budgets),
        "shuffle_buffer": buffer_size,
        "train_tokens_target": budgets.get("train"),
        "val_tokens_target": budgets.get("val"),
        **{key: value for key, value in description.items() if key != "files"},
        "seed": seed,
        "source_fingerprint": wanted,
        "build_version": BUILD_VERSION,
        **tokenizer_meta(tokenizer),
    }
    folder = Path(root) / entry.name
    return CachePlan(entry, folder, seed, shard_bytes, separator, budgets, buffer_size, wanted, meta)


def run(plan: CachePlan, tokenizer: Tokenizer, fill: Callable[[PretrainWriter], None]) -> dict[str, Any]:
    """Build the cache of a plan, unless it is there: `fill` is to write what `writer.consumed` does not count yet.

    Returns its meta.json, with `reused` if it was there. Raises ValueError if there is nothing to train on.
    """
    with locked(plan.folder):
        if kept := up_to_date(plan.folder, plan.fingerprint, tokenizer, resume=True):
            return kept
        with writing_pretrain(
            plan.folder,
            plan.meta,
            vocab_size=tokenizer.vocab_size,
            separator=plan.separator,
            shard_bytes=plan.shard_bytes,
            indexed=not plan.budgets,
            key=f"{plan.fingerprint}/{tokenizer.sha256}",
        ) as writer:
            fill(writer)
            if not writer.n_tokens("train"):
                raise ValueError(f"the source {plan.source.name} has no text to train on; check what it reads")
    return writer.meta


def write_blocks(
    writer: PretrainWriter, plan: CachePlan, part: str, blocks: Iterable[Block], progress: Progress | None = None
) -> int:
    """Write the blocks of a part from where it stands; returns how many of their documents were known before.

    From one stream val is filled to its number of tokens, then train; the document at the boundary is split between
    them, as in the published caches of this format, and the rest is not read.
    """
    reused, total = 0, sum(plan.budgets.values())
    if plan.budgets and _written(writer, plan) >= total:
        return 0
    for block in blocks:
        if not plan.budgets:
            writer.add_block(part, block, 0, len(block.ids))
        start = 0
        for split in plan.budgets:  # val first
            stop = min(len(block.ids), start + plan.budgets[split] - writer.n_tokens(split))
            if stop > start:
                writer.add_block(split, block, start, stop)
                start = stop
        writer.consumed[part] = writer.consumed.get(part, 0) + len(block)
        writer.commit()
        reused += block.reused
        written = _written(writer, plan) if plan.budgets else writer.n_tokens(part)
        if progress:
            progress(Done(part, writer.consumed[part], writer.n_bytes(), written, of_tokens=total or None))
        if plan.budgets and written >= total:
            break
    return reused


def _written(writer: PretrainWriter, plan: CachePlan) -> int:
    return sum(map(writer.n_tokens, plan.budgets))


def shuffled(texts: Iterable[str], buffer_size: int, seed: int) -> Iterator[str]:
    """Texts in random order with a buffer of limited size; the order is that of the published caches."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> str:
        return buffer.pop(int(torch.randint(len(buffer), (1,), generator=generator)))

    buffer: list[str] = []
    for text in texts:
        buffer.append(text)
        if len(buffer) >= buffer_size:
            yield draw()
    while buffer:
        yield draw()
