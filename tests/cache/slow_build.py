"""A build for tests that kill it.

The source is `folder` (two splits) or `stream` (one stream, shuffled, with budgets); small blocks and commits put many
durable states into a short run. The texts are made from numbers, so every run reads the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt.cache import encode, pretrain, words, writing
from niels_gpt.data.registry import SOURCES, Source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.tokenizer import load_tokenizer

DOCUMENTS = 600


def texts(n: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    for i in range(n):
        kind = ("word", "other naïve words", "x" * 40, "\n\n- item", "12 345")[i % 5]
        words = " ".join(f"{kind} {draw.randrange(50)}" for _ in range(draw.randrange(60)))
        yield f"document {i} of {n} in {seed}: {words}"


def sources(n: int) -> dict[str, Source]:
    def documents(settings: Settings, split: str) -> Iterator[Document]:
        return (Document(text, "folder") for text in texts(n // 5 if split == "val" else n, 1 + (split == "val")))

    def stream(settings: Settings) -> Iterator[Document]:
        return (Document(text, "stream") for text in texts(n, 3))

    def describe(settings: Settings, phase: str) -> dict[str, Any]:
        return {"dataset_name": "made", "split_rule": None, "n": n}

    made = (Source("folder", describe, documents=documents), Source("stream", describe, stream=stream))
    return {source.name: source for source in made}


def build(root: Path, model: Path, source: str, n: int = DOCUMENTS, workers: int | None = 1) -> dict[str, Any]:
    encode.BATCH_DOCUMENTS, encode.INLINE_BATCHES = 16, 2
    writing.COMMIT_TOKENS, words.MEMORY_TOKENS = 3000, 500
    SOURCES.update(sources(n))
    settings = validate_overrides(
        {
            "reproducibility": {"dataset_shuffle_buffer_size": 100},
            "data": {"caches": {"shard_bytes": 9000, "train_tokens": n * 130, "val_tokens": 7001}},
        }
    )
    return pretrain.build_pretrain(settings, load_tokenizer(model), source, root=root, workers=workers)
