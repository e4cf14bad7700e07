"""What a tokenizer is to the rest of the project, and what both kinds share: checks, and text that arrives by parts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

Ids = Sequence[int] | torch.Tensor | np.ndarray
Device = str | torch.device | None


class Tokenizer(Protocol):
    """What everything above this module knows of a tokenizer."""

    @property
    def kind(self) -> str: ...  # "sentencepiece" | "byte"
    @property
    def vocab_size(self) -> int: ...
    @property
    def sha256(self) -> str | None: ...  # of the model file; None for bytes
    @property
    def eot_id(self) -> int | None: ...  # ends a message; None for bytes
    @property
    def drops_leading_blanks(self) -> bool: ...  # at the start of a text; published models do
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]: ...  # the same ids
    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor: ...  # (n,) int64
    def decode(self, ids: Ids) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...  # may be part of a character; b"" for specials
    def special_token_ids(self) -> dict[str, int]: ...  # of sys, usr, asst, eot; empty for bytes


class TextStream:
    """Text of ids that arrive one at a time: only whole characters come out.

    What `push` and the final `flush` return joins to exactly `tokenizer.decode(all ids)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_blanks = tokenizer.drops_leading_blanks

    def push(self, token_id: int) -> str:
        """Text that this id completes; "" while a character is unfinished."""
        return self._emit(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """U+FFFD if the ids end inside a character, else ""."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._drop_blanks:
            text = text.lstrip(" ")
            self._drop_blanks = not text
        return text


def checked(ids: Ids, vocab_size: int) -> Sequence[int]:
    """The ids as a sequence; ValueError if they are not 1-D integers in 0..vocab_size - 1."""
    if not isinstance(ids, Sequence):
        if ids.ndim != 1 or "int" not in str(ids.dtype):
            raise ValueError(f"ids must be a 1-D integer tensor, not {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.tolist()
    if isinstance(ids, str | bytes):
        raise ValueError("ids must be a sequence of integers or a 1-D tensor, not text")
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"token id {wrong} is outside the vocabulary 0..{vocab_size - 1}")
    return ids
