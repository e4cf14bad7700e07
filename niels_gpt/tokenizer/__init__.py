"""Tokenizers: text <-> token ids, and the training of new ones.

Two kinds behind one face (`Tokenizer`): SentencePiece models, published or trained here, and the byte tokenizer of the
first published models. Text never becomes control: no text whatsoever encodes to a sentinel's id, and ids of specials
decode to nothing; only `chat_format` puts sentinels into sequences. Tokenizers trained here are lossless
(`decode(encode(s)) == s`); published ones fold whitespace and compatibility characters, as their models do. Half of a
surrogate pair, which UTF-8 cannot hold, is read as U+FFFD by all of them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from niels_gpt.settings import Settings, tokenizer_file
from niels_gpt.tokenizer.contract import Device, Ids, TextStream, Tokenizer
from niels_gpt.tokenizer.models import ByteTokenizer, SentencePieceTokenizer, missing_tokenizer
from niels_gpt.tokenizer.training import MODEL_TYPES, train_tokenizer

__all__ = [
    "DEFAULT_TOKENIZER_PATH",
    "MODEL_TYPES",
    "ByteTokenizer",
    "Device",
    "Ids",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "decode",
    "encode",
    "get_default_tokenizer",
    "load_tokenizer",
    "missing_tokenizer",
    "open_tokenizer",
    "train_tokenizer",
]

DEFAULT_TOKENIZER_PATH = Path("artifacts/tokenizer/v2/spm.model")


def load_tokenizer(
    path: str | Path, expected_special_token_ids: dict[str, int] | None = None
) -> SentencePieceTokenizer:
    """Load a SentencePiece model; errors as for `SentencePieceTokenizer`."""
    return SentencePieceTokenizer(path, expected_special_token_ids=expected_special_token_ids)


def open_tokenizer(settings: Settings, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of the settings, or the model at `path`, whose sentinels must have the settings' ids.

    Raises:
        FileNotFoundError: there is none; the message says how to make one.
        ValueError: as for `SentencePieceTokenizer`.
    """
    chosen = settings.tokenizer
    if path is None and chosen.type == "byte":
        return ByteTokenizer()
    found = tokenizer_file(chosen) if path is None else path
    if found is None:
        raise FileNotFoundError(missing_tokenizer(Path(chosen.model_path), chosen.vocab_size))
    return load_tokenizer(found, chosen.expected_special_token_ids.model_dump())


def get_default_tokenizer() -> SentencePieceTokenizer:
    """The tokenizer at `DEFAULT_TOKENIZER_PATH` (read anew when the file changed); FileNotFoundError if none."""
    if not DEFAULT_TOKENIZER_PATH.is_file():
        raise FileNotFoundError(missing_tokenizer(DEFAULT_TOKENIZER_PATH))
    path = DEFAULT_TOKENIZER_PATH.resolve()
    return _load_once(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load_once(path: Path, mtime_ns: int) -> SentencePieceTokenizer:
    return load_tokenizer(path)


def encode(text: str, device: Device = None) -> torch.Tensor:
    """Ids of a text under the default tokenizer, int64 of shape (n,)."""
    return get_default_tokenizer().encode_torch(text, device)


def decode(ids: Ids) -> str:
    """Text of ids under the default tokenizer."""
    return get_default_tokenizer().decode(ids)
