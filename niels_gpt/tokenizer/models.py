"""The two kinds of tokenizer: SentencePiece models with the four sentinels, and plain bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from niels_gpt import files
from niels_gpt.settings import BYTE_VOCABULARY
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer.contract import Device, Ids, checked
from niels_gpt.unicode import BLANK, valid_unicode


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
            raise FileNotFoundError(missing_tokenizer(path))
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
        text = valid_unicode(text)
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
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays, without making a Python integer of every id."""
        texts = [valid_unicode(text) for text in texts]
        if self._blank_ids and any(BLANK in text for text in texts):
            return [np.array(self.encode(text), dtype=np.int32) for text in texts]
        encoded: list[np.ndarray] = self._sp.encode(texts, return_type="numpy")
        if not self._spelling:
            return encoded
        sentinels = list(self._spelling)
        return [
            np.array(self._without_sentinels(ids.tolist()), dtype=np.int32) if np.isin(ids, sentinels).any() else ids
            for ids in encoded
        ]

    def _without_sentinels(self, ids: list[int]) -> list[int]:
        if not self._spelling or self._spelling.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._spelling.get(token_id, (token_id,))]

    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor:
        """Ids as an int64 tensor of shape (n,)."""
        return torch.tensor(self.encode(text), dtype=torch.long, device=device)

    def decode(self, ids: Ids) -> str:
        """Text of ids: specials vanish, bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(map(self._bytes.__getitem__, checked(ids, self.vocab_size))).decode("utf-8", "replace")
        return text.lstrip(" ") if self.drops_leading_blanks else text

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id: U+2581 for a blank, <0x0A> for a byte, <s> and the like."""
        piece: str = self._sp.id_to_piece(checked([token_id], self.vocab_size)[0])
        return piece

    def is_byte(self, token_id: int) -> bool:
        """Whether the id stands for one byte of a character that no piece holds."""
        return bool(self._sp.is_byte(checked([token_id], self.vocab_size)[0]))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of an id, perhaps part of a character; b"" for specials."""
        return self._bytes[checked([token_id], self.vocab_size)[0]]

    def special_token_ids(self) -> dict[str, int]:
        """Name -> id of the four sentinels."""
        return dict(self._special_ids)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, without specials: the tokenizer of the first published models."""

    kind = "byte"
    vocab_size = BYTE_VOCABULARY
    sha256: str | None = None
    eot_id: int | None = None
    drops_leading_blanks = False

    def encode(self, text: str) -> list[int]:
        """Ids of a text: its bytes."""
        return list(valid_unicode(text).encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as uint8 arrays."""
        return [np.frombuffer(valid_unicode(text).encode("utf-8"), dtype=np.uint8) for text in texts]

    def encode_torch(self, text: str, device: Device = None) -> torch.Tensor:
        """Ids as an int64 tensor of shape (n,)."""
        return torch.tensor(self.encode(text), dtype=torch.long, device=device)

    def decode(self, ids: Ids) -> str:
        """Text of ids: bytes that are not UTF-8 become U+FFFD."""
        return bytes(checked(ids, self.vocab_size)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte."""
        return bytes(checked([token_id], self.vocab_size))

    def special_token_ids(self) -> dict[str, int]:
        """None: {}."""
        return {}


def missing_tokenizer(path: Path, vocab_size: int | None = None) -> str:
    """What to tell people when there is no tokenizer at `path`: the command that makes it, offline."""
    where = f" --out_dir {path.parent}" if path.name == "spm.model" else ""
    size = "" if vocab_size is None else f" --vocab_size {vocab_size}"
    return (
        f"there is no tokenizer model {path}; make it from text that comes with the installation: "
        f"niels-gpt tokenizer --source chitchat --source primer{size}{where} "
        "(or from the mix of your config: niels-gpt tokenizer --config FILE)"
    )


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
                f"vocabulary of {name}; `niels-gpt tokenizer` makes a tokenizer that fits"
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
