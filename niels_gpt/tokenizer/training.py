"""Training tokenizers: from texts to a folder of spm.model, spm.vocab and tokenizer_meta.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from niels_gpt import files, spm_training
from niels_gpt.settings.fields import MAX_VOCAB_SIZE
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS
from niels_gpt.tokenizer.models import SentencePieceTokenizer
from niels_gpt.unicode import valid_unicode

MODEL_TYPES = ("bpe", "unigram")


def train_tokenizer(
    texts: Iterable[str],
    out_dir: str | Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    seed: int = 42,
    sources: dict[str, Any] | None = None,
) -> Path:
    """Train a lossless tokenizer; write spm.model, spm.vocab and tokenizer_meta.json to `out_dir`.

    The same texts and options give the same bytes. Nothing is written unless the new model passes its checks.

    Args:
        texts: training text; CRLF is read as LF.
        seed: recorded only, as nothing here is random.
        sources: further keys of the meta file, such as input_files.

    Returns: the path of spm.model.

    Raises:
        ValueError: no text, or a vocab_size that the text cannot fill (the largest possible one is named).
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"unknown model_type {model_type!r}; choose one of {', '.join(MODEL_TYPES)}")
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size {vocab_size} is above {MAX_VOCAB_SIZE}, the largest that fits the token caches")
    kept = [valid_unicode(text).replace("\r\n", "\n") for text in texts]
    if not any(text.strip() for text in kept):
        raise ValueError("there is no text to train a tokenizer on")
    model = spm_training.train_model(kept, vocab_size, model_type)
    tokenizer = SentencePieceTokenizer.from_bytes(model, expected_special_token_ids=SPECIAL_TOKEN_IDS)
    meta = {
        **(sources or {}),
        "vocab_size": tokenizer.vocab_size,
        "model_type": model_type,
        "special_tokens": tokenizer.special_token_ids(),
        "seed": seed,
        "sentencepiece_version": sentencepiece.__version__,
        "inputs_sha256": _lines_sha256(kept),
        "tokenizer_sha256": tokenizer.sha256,
    }
    out_dir = Path(out_dir)
    files.write_text(out_dir / "spm.vocab", spm_training.vocab_table(model))
    files.write_json(out_dir / "tokenizer_meta.json", meta)
    files.write_bytes(out_dir / "spm.model", model)
    return out_dir / "spm.model"


def _lines_sha256(texts: Iterable[str]) -> str:
    """Of all texts, a line break after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\n")
    return digest.hexdigest()
