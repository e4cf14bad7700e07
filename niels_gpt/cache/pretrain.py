"""Pretraining caches: from the documents of a source to token shards, and from shards to the mix a run draws from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from niels_gpt.batching import TokenStream
from niels_gpt.cache.format import open_pretrain
from niels_gpt.cache.shared import (
    Progress,
    fingerprint,
    in_batches,
    open_sources,
    renormalised,
    tokenizer_meta,
    up_to_date,
    warn,
)
from niels_gpt.cache.writing import DEFAULT_SHARD_BYTES, PretrainWriter, writing_pretrain
from niels_gpt.data.registry import get_source, is_optional
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import assert_no_special_collision
from niels_gpt.tokenizer import Tokenizer

_BATCH = 64  # documents encoded at once, on all cores
_BYTE_SEPARATOR = "\n\n"  # ends a document where the tokenizer has no end id


def build_pretrain(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    seed: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's documents; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. Every document ends
    with the end id.

    Raises:
        FileNotFoundError: the source's files are not there.
        ValueError: unknown source, no text in it, or a document with a special token literal.
    """
    entry = get_source(source)
    if entry.documents is None:
        raise ValueError(f"the source {entry.name} has chats, not text; build it for sft")
    description = entry.describe(settings, "pretrain")
    wanted = fingerprint(description, seed=seed, shard_bytes=shard_bytes, separator=tokenizer.eot_id)
    folder = Path(root) / entry.name
    if kept := up_to_date(folder, wanted, tokenizer):
        return kept
    meta = {
        "dataset_config": None,
        "streaming": False,
        "shuffle_buffer": None,
        "train_tokens_target": None,
        "val_tokens_target": None,
        **{key: value for key, value in description.items() if key != "files"},
        "seed": seed,
        "source_fingerprint": wanted,
        **tokenizer_meta(tokenizer),
    }
    with writing_pretrain(
        folder, meta, vocab_size=tokenizer.vocab_size, separator=tokenizer.eot_id, shard_bytes=shard_bytes
    ) as writer:
        for split in ("val", "train"):
            texts = (document.text for document in entry.documents(settings, split))
            for n, (ids, n_bytes) in enumerate(_encoded(texts, tokenizer, f"{entry.name}/{split}"), start=1):
                writer.add(split, ids, n_bytes)
                if progress:
                    progress(split, n)
        if not writer.n_tokens("train"):
            raise ValueError(f"the source {entry.name} has no text to train on; check what it reads")
    return writer.meta


def _encoded(texts: Iterable[str], tokenizer: Tokenizer, name: str) -> Iterator[tuple[list[int], int]]:
    """(ids, size in UTF-8 bytes) of every text; ValueError for a special token literal in one."""
    index = 0
    for batch in in_batches(texts, _BATCH):
        for text in batch:
            assert_no_special_collision(text, dataset=name, doc_index=index, field="text")
            index += 1
        ends = "" if tokenizer.eot_id is not None else _BYTE_SEPARATOR
        encoded = tokenizer.encode_batch([text + ends for text in batch])
        yield from zip(encoded, (len(text.encode("utf-8", "surrogatepass")) for text in batch), strict=True)


def write_budgeted(
    writer: PretrainWriter, texts: Iterable[str], tokenizer: Tokenizer, *, name: str, val_tokens: int, train_tokens: int
) -> None:
    """Fill val to its number of tokens, then train to its own, from one stream of texts; the rest is not read.

    The text at the boundary is split between them, as in the published caches of this format.
    """
    left = {"val": val_tokens, "train": train_tokens}
    for ids, n_bytes in _encoded(texts, tokenizer, name):
        start = 0
        for split in left:
            written = writer.add(split, ids, n_bytes, start=start, limit=left[split])
            start += written
            left[split] -= written
        if not any(left.values()):
            return


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
