"""Tokenizers: text <-> token ids, and the training of new ones.

Two kinds behind one face (`Tokenizer`): SentencePiece models, published or trained here, and the byte tokenizer of the
first published models. Text never becomes control: no text whatsoever encodes to a sentinel's id, and ids of specials
decode to nothing; only `chat_format` puts sentinels into sequences. Tokenizers trained here are lossless
(`decode(encode(s)) == s`); published ones fold whitespace and compatibility characters, as their models do. Half of a
surrogate pair, which UTF-8 cannot hold, is read as U+FFFD by all of them.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import torch

from niels_gpt import files, spm_training
from niels_gpt.settings import BYTE_VOCABULARY
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS
from niels_gpt.spm_training import BLANK

DEFAULT_TOKENIZER_PATH = Path("artifacts/tokenizer/v2/spm.model")
MODEL_TYPES = ("bpe", "unigram")
MAX_VOCAB_SIZE = 65535  # ids are cached as uint16

_SURROGATE = re.compile("[\ud800-\udfff]")

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
    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor: ...  # (n,) int64
    def decode(self, ids: Ids) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...  # may be part of a character; b"" for specials
    def special_token_ids(self) -> dict[str, int]: ...  # of sys, usr, asst, eot; empty for bytes


class SentencePieceTokenizer:
    """A SentencePiece model whose vocabulary holds the four sentinels.

    Args:
        model_path: the `.model` file.
        special_tokens: sentinel literals by name (sys, usr, asst, eot).
        expected_special_token_ids: ids the sentinels must have; None accepts any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model, or a sentinel is missing or has another id.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        model_path: str | Path,
        special_tokens: dict[str, str] = SPECIAL_TOKENS,
        expected_special_token_ids: dict[str, int] | None = None,
    ) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer model {path}; `niels-gpt quickstart` makes one")
        self._load(path.read_bytes(), str(path), special_tokens, expected_special_token_ids)
        self.model_path: Path | None = path

    @classmethod
    def from_bytes(
        cls,
        model_proto: bytes,
        *,
        special_tokens: dict[str, str] = SPECIAL_TOKENS,
        expected_special_token_ids: dict[str, int] | None = None,
        name: str = "the tokenizer model in memory",
    ) -> SentencePieceTokenizer:
        """The same from a model's bytes, as checkpoints carry them; `name` is what errors call it."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model_proto, name, special_tokens, expected_special_token_ids)
        tokenizer.model_path = None
        return tokenizer

    def _load(
        self, model: bytes, name: str, special_tokens: dict[str, str], expected_ids: dict[str, int] | None
    ) -> None:
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model, out_type=int)
            size = self._sp.get_piece_size() if model else 0
        except (RuntimeError, ValueError, OSError):
            size = 0
        if not size:
            raise ValueError(f"{name} is not a SentencePiece model; it may be damaged or another kind of file")
        self.model_bytes = model
        self.sha256 = files.sha256_bytes(model)
        self.vocab_size: int = size
        self.special_tokens = dict(special_tokens)
        self._special_ids = _find_sentinels(self._sp, special_tokens, expected_ids, name)
        self.eot_id = self._special_ids.get("eot")
        silent = set(self._special_ids.values())
        self._bytes = tuple(b"" if i in silent else _piece_bytes(self._sp, i) for i in range(size))
        blank = self._sp.piece_to_id(BLANK)
        self.drops_leading_blanks = not self._sp.is_unknown(blank) and self._sp.decode([blank]) == ""
        # Published models match sentinels inside text (user-defined symbols, even after NFKC): those get spelled out.
        self._spelling = {
            self._special_ids[key]: self._sp.encode(literal[:1]) + self._sp.encode(literal[1:])
            for key, literal in special_tokens.items()
            if not self._sp.is_control(self._special_ids[key])
        }
        byte_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        keeps_blanks = not self.drops_leading_blanks and all(self._sp.is_byte(i) for i in byte_ids)
        self._blank_ids = byte_ids if keeps_blanks else []

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never the id of a sentinel."""
        text = _valid_unicode(text)
        if not self._blank_ids or BLANK not in text:
            return self._without_sentinels(self._sp.encode(text))
        head, *rest = text.split(BLANK)
        ids: list[int] = self._sp.encode(head)
        for part in rest:
            ids += self._blank_ids
            ids += self._sp.encode(part)
        return self._without_sentinels(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores (for a handful of short texts `encode` is quicker)."""
        texts = [_valid_unicode(text) for text in texts]
        if self._blank_ids and any(BLANK in text for text in texts):
            return [self.encode(text) for text in texts]
        return [self._without_sentinels(ids) for ids in self._sp.encode(texts)]

    def _without_sentinels(self, ids: list[int]) -> list[int]:
        if not self._spelling or self._spelling.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._spelling.get(token_id, (token_id,))]

    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor:
        """Ids as an int64 tensor of shape (n,)."""
        return torch.tensor(self.encode(text), dtype=torch.long, device=device)

    def decode(self, ids: Ids) -> str:
        """Text of ids: specials vanish, bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(map(self._bytes.__getitem__, _checked(ids, self.vocab_size))).decode("utf-8", "replace")
        return text.lstrip(" ") if self.drops_leading_blanks else text

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[_checked([token_id], self.vocab_size)[0]]

    def special_token_ids(self) -> dict[str, int]:
        return dict(self._special_ids)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, without specials: the tokenizer of the first published models."""

    kind = "byte"
    vocab_size = BYTE_VOCABULARY
    sha256: str | None = None
    eot_id: int | None = None
    drops_leading_blanks = False

    def encode(self, text: str) -> list[int]:
        return list(_valid_unicode(text).encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor:
        """Ids as an int64 tensor of shape (n,)."""
        return torch.tensor(self.encode(text), dtype=torch.long, device=device)

    def decode(self, ids: Ids) -> str:
        """Text of ids: bytes that are not UTF-8 become U+FFFD."""
        return bytes(_checked(ids, self.vocab_size)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes(_checked([token_id], self.vocab_size))

    def special_token_ids(self) -> dict[str, int]:
        return {}


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


def _find_sentinels(
    sp: sentencepiece.SentencePieceProcessor,
    special_tokens: dict[str, str],
    expected_ids: dict[str, int] | None,
    name: str,
) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, literal in special_tokens.items():
        token_id = sp.piece_to_id(literal)
        if sp.is_unknown(token_id):
            raise ValueError(
                f"the special token {key!r} must encode to exactly one piece id, but {literal} is not in the "
                f"vocabulary of {name}; `niels-gpt quickstart` makes a tokenizer that fits"
            )
        if expected_ids is not None and expected_ids.get(key) != token_id:
            raise ValueError(
                f"the special token {key!r} must encode to exactly one piece id, {expected_ids.get(key)}, but it is "
                f"{token_id} in {name}; this is not the tokenizer that the model or cache was made with"
            )
        found[key] = token_id
    return found


def _piece_bytes(sp: sentencepiece.SentencePieceProcessor, token_id: int) -> bytes:
    piece: str = sp.id_to_piece(token_id)
    if sp.is_byte(token_id):
        return bytes([int(piece[3:5], 16)])  # "<0x0A>"
    if sp.is_control(token_id) or sp.is_unknown(token_id):
        return b""
    return piece.replace(BLANK, " ").encode("utf-8")


def _valid_unicode(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def _checked(ids: Ids, vocab_size: int) -> Sequence[int]:
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


def load_tokenizer(
    path: str | Path, expected_special_token_ids: dict[str, int] | None = None
) -> SentencePieceTokenizer:
    """Load a SentencePiece model; errors as for `SentencePieceTokenizer`."""
    return SentencePieceTokenizer(path, expected_special_token_ids=expected_special_token_ids)


def get_default_tokenizer() -> SentencePieceTokenizer:
    """The tokenizer at `DEFAULT_TOKENIZER_PATH` (read anew when the file changed); FileNotFoundError if none."""
    path = DEFAULT_TOKENIZER_PATH.resolve()
    return _load_once(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=1)
def _load_once(path: Path, mtime_ns: int) -> SentencePieceTokenizer:
    return load_tokenizer(path)


def encode(text: str, device: Device = None) -> torch.Tensor:
    """Ids of a text under the default tokenizer, int64 of shape (n,)."""
    return get_default_tokenizer().encode_torch(text, device)


def decode(ids: Ids) -> str:
    """Text of ids under the default tokenizer."""
    return get_default_tokenizer().decode(ids)


# training


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
    digest = hashlib.sha256()
    kept: list[str] = []
    for text in texts:
        kept.append(_valid_unicode(text).replace("\r\n", "\n"))
        digest.update(kept[-1].encode("utf-8") + b"\n")
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
        "inputs_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
    }
    out_dir = Path(out_dir)
    files.write_text(out_dir / "spm.vocab", spm_training.vocab_table(tokenizer._sp))
    files.write_json(out_dir / "tokenizer_meta.json", meta)
    files.write_bytes(out_dir / "spm.model", model)
    return out_dir / "spm.model"
