"""Pretraining caches: from the documents of a source to token shards, and from shards to the mix a run draws from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from niels_gpt.batching import TokenStream
from niels_gpt.cache.encode import Block, Encoder
from niels_gpt.cache.folder import locked
from niels_gpt.cache.format import open_pretrain
from niels_gpt.cache.known import KnownDocuments
from niels_gpt.cache.shared import (
    BUILD_VERSION,
    Done,
    Progress,
    fingerprint,
    open_sources,
    renormalised,
    tokenizer_meta,
    up_to_date,
    warn,
)
from niels_gpt.cache.writing import PretrainWriter, writing_pretrain
from niels_gpt.data.registry import Source, get_source, is_optional
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer

STREAM = "stream"  # what `writer.consumed` calls the documents of a source that is one stream


def build_pretrain(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    seed: int | None = None,
    shard_bytes: int | None = None,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's documents; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. An interrupted build of
    the same is gone on with, and documents whose tokens are in the old cache are not tokenized again: the result then
    has `reused_documents`. None of this changes a byte of the cache, nor does the number of worker processes.

    `seed`, `shard_bytes` and the budgets in tokens, which are for sources that are one stream, are those of
    `data.caches` unless given. `workers` are all cores unless given.

    Raises:
        FileNotFoundError: the source's files are not there.
        ValueError: unknown source, no text in it, or a document with a special token literal.
    """
    entry, chosen = get_source(source), settings.data.caches
    if entry.documents is None and entry.stream is None:
        raise ValueError(f"the source {entry.name} has chats, not text; build it for sft")
    seed = chosen.seed if seed is None else seed
    shard_bytes = chosen.shard_bytes if shard_bytes is None else shard_bytes
    budgets, buffer_size = {}, None
    if entry.stream is not None:
        given = {"val": val_tokens, "train": train_tokens}
        defaults = {"val": chosen.val_tokens, "train": chosen.train_tokens}
        budgets = {split: defaults[split] if n is None else n for split, n in given.items()}
        buffer_size = _buffer_size(settings, entry.name)
    separator = tokenizer.eot_id if entry.ends_documents else None
    description = entry.describe(settings, "pretrain")
    options = {"seed": seed, "shard_bytes": shard_bytes, "separator": separator, "ends": entry.ends_documents}
    wanted = fingerprint(description, **options, budgets=budgets, shuffle_buffer=buffer_size)
    meta = {
        "dataset_config": None,
        "streaming": entry.stream is not None,
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
    with locked(folder):
        if kept := up_to_date(folder, wanted, tokenizer, resume=True):
            return kept
        key = f"{wanted}/{tokenizer.sha256}"
        known = KnownDocuments(folder, tokenizer, separator=separator, version=BUILD_VERSION)
        with (
            Encoder(tokenizer, separate=entry.ends_documents, workers=workers) as encoder,
            writing_pretrain(
                folder,
                meta,
                vocab_size=tokenizer.vocab_size,
                separator=separator,
                shard_bytes=shard_bytes,
                indexed=entry.stream is None,
                key=key,
            ) as writer,
        ):
            if entry.stream is not None:
                texts = shuffled((d.text for d in entry.stream(settings)), buffer_size, seed)
                write_budgeted(writer, texts, encoder, name=entry.name, budgets=budgets, progress=progress)
                reused = 0
            else:
                reused = _write_documents(writer, settings, entry, encoder, known, progress)
            if not writer.n_tokens("train"):
                raise ValueError(f"the source {entry.name} has no text to train on; check what it reads")
    return {**writer.meta, "reused_documents": reused} if reused else writer.meta


def _write_documents(
    writer: PretrainWriter,
    settings: Settings,
    entry: Source,
    encoder: Encoder,
    known: KnownDocuments,
    progress: Progress | None,
) -> int:
    """Write both splits of a source; returns how many documents were found in the old cache."""
    assert entry.documents is not None
    reused = 0
    for split in ("val", "train"):
        first = writer.consumed.get(split, 0)
        texts = _texts(entry.documents(settings, split), first)
        for block in encoder.blocks(texts, f"{entry.name}/{split}", first=first, lookup=known):
            writer.add_block(split, block, 0, len(block.ids))
            _consumed(writer, split, block)
            reused += block.reused
            if progress:
                progress(Done(split, writer.n_documents(split), writer.n_bytes(), writer.n_tokens(split)))
    return reused


def _texts(documents: Iterable[Document], first: int) -> Iterator[str]:
    return (document.text for document in islice(documents, first, None))


def _consumed(writer: PretrainWriter, what: str, block: Block) -> None:
    writer.consumed[what] = writer.consumed.get(what, 0) + len(block)
    writer.commit()


def write_budgeted(
    writer: PretrainWriter,
    texts: Iterable[str],
    encoder: Encoder,
    *,
    name: str,
    budgets: dict[str, int],
    progress: Progress | None = None,
) -> None:
    """Fill val to its number of tokens, then train to its own, from one stream of texts; the rest is not read.

    The text at the boundary is split between them, as in the published caches of this format.
    """
    total = sum(budgets.values())
    if sum(map(writer.n_tokens, budgets)) >= total:
        return
    first = writer.consumed.get(STREAM, 0)
    for block in encoder.blocks(islice(texts, first, None), name, first=first):
        start = 0
        for split in ("val", "train"):
            stop = min(len(block.ids), start + budgets[split] - writer.n_tokens(split))
            if stop > start:
                writer.add_block(split, block, start, stop)
                start = stop
        _consumed(writer, STREAM, block)
        written = sum(map(writer.n_tokens, budgets))
        if progress:
            progress(Done(name, writer.consumed[STREAM], writer.n_bytes(), written, of_tokens=total))
        if written >= total:
            return


def _buffer_size(settings: Settings, source: str) -> int | None:
    """How many documents of a stream are shuffled at a time; None where `data.SOURCE.shuffle` is off."""
    chosen = getattr(settings.data, source, None)
    if not getattr(chosen, "shuffle", True):
        return None
    return getattr(chosen, "shuffle_buffer", settings.reproducibility.dataset_shuffle_buffer_size)


def shuffled(texts: Iterable[str], buffer_size: int | None, seed: int) -> Iterator[str]:
    """Texts in random order with a buffer of limited size; the order is that of the published caches."""
    if buffer_size is None:
        yield from texts
        return
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


def open_mix(
    settings: Settings, tokenizer: Tokenizer, split: str, T: int
) -> tuple[dict[str, TokenStream], dict[str, float]]:
    """The streams of `data.mix_pretrain` and their weights, which sum to 1.

    Optional sources without a cache and sources without tokens are left out with a warning, and the weights scaled up.
    For "val", `data.val_pretrain_source` is added (with weight 0 if the mix does not have it), and other sources that
    are too short for one window of T+1 tokens are left out.

    Raises:
        FileNotFoundError: caches are missing, all of them named.
        ValueError: a cache is damaged or of another tokenizer, nothing remains, or the validation source is gone.
    """
    data = settings.data
    names = sorted({*data.mix_pretrain, *([data.val_pretrain_source] if split == "val" else [])})

    def open_one(name: str) -> TokenStream:
        return open_pretrain(
            data.caches.pretrain_token_cache,
            name,
            split,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=settings.model.V,
            special_token_ids=tokenizer.special_token_ids(),
        )

    streams = open_sources(names, open_one)
    for name in list(streams):
        may_be_short = is_optional(name) if split == "train" else name != data.val_pretrain_source
        if problem := _problem(streams[name], T, may_be_short):
            warn(f"{name} is left out of the {split} mix: {problem}")
            del streams[name]
    if split == "val" and data.val_pretrain_source not in streams:
        raise ValueError(
            f"the validation source {data.val_pretrain_source} has no validation text; raise its val_frac, or set "
            f"data.val_pretrain_source to a source that has some{' such as ' + min(streams) if streams else ''}"
        )
    if not streams:
        raise ValueError(f"no source of data.mix_pretrain has any text: {', '.join(names)}; build their caches")
    return streams, renormalised(data.mix_pretrain, list(streams))


def _problem(stream: TokenStream, T: int, may_be_short: bool) -> str | None:
    """Why a stream is to be left out; ValueError if it is too short and may not be."""
    if not stream.num_tokens:
        return "its cache holds no tokens"
    try:
        stream.windows(T)
    except ValueError as error:
        if not may_be_short:
            raise
        return str(error)
    return None
