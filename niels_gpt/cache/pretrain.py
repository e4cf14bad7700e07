"""Pretraining caches: from the documents of a source to token shards, and from shards to the mix a run draws from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from niels_gpt.batching import TokenStream
from niels_gpt.cache.building import plan_cache, run, write_blocks
from niels_gpt.cache.encode import Encoder
from niels_gpt.cache.format import open_pretrain
from niels_gpt.cache.known import KnownDocuments
from niels_gpt.cache.shared import BUILD_VERSION, Progress, open_sources, renormalised, warn
from niels_gpt.cache.writing import PretrainWriter
from niels_gpt.data.registry import is_optional
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer


def build_pretrain(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build ROOT/SOURCE from the source's documents; returns its meta.json.

    A whole cache of the same data, tokenizer and options is kept: the result then has `reused`. An interrupted build of
    the same is gone on with, and documents whose tokens are in the old cache are not tokenized again: the result then
    has `reused_documents`. None of this changes a byte of the cache, nor does the number of worker processes.

    The budgets in tokens, which are for sources that are one stream, are those of `data.caches` unless given. `workers`
    are all cores unless given.

    Raises:
        FileNotFoundError: the source's files are not there.
        ValueError: unknown source, no text in it, or a document with a special token literal.
    """
    budgets = {"train_tokens": train_tokens, "val_tokens": val_tokens}
    plan = plan_cache(settings, tokenizer, source, root=root, **budgets)
    reused = 0

    def fill(writer: PretrainWriter) -> None:
        nonlocal reused
        known = None
        if not plan.budgets:
            known = KnownDocuments(plan.folder, tokenizer, separator=plan.separator, version=BUILD_VERSION)
        with Encoder(tokenizer, separate=plan.source.ends_documents, workers=workers) as encoder:
            for part in plan.parts:
                first = writer.consumed.get(part, 0)
                texts = islice(plan.texts(settings, part), first, None)
                blocks = encoder.blocks(texts, f"{plan.source.name}/{part}", first=first, lookup=known)
                reused += write_blocks(writer, plan, part, blocks, progress)

    meta = run(plan, tokenizer, fill)
    return {**meta, "reused_documents": reused} if reused else meta


def open_source(settings: Settings, tokenizer: Tokenizer, name: str, split: str) -> TokenStream:
    """One source's cache in `data.caches.pretrain_token_cache`, for the tokenizer and model.V of a run.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or was built with another tokenizer.
    """
    return open_pretrain(
        settings.data.caches.pretrain_token_cache,
        name,
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=settings.model.V,
        special_token_ids=tokenizer.special_token_ids(),
    )


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

    streams = open_sources(names, lambda name: open_source(settings, tokenizer, name, split))
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
