"""The on-disk formats of token caches, and reading them; `writing` is the other half.

* Pretraining, `ROOT/SOURCE/`: `{train,val}/shard_%05d.bin`, uint16 little-endian tokens. Documents run across shards;
  `{train,val}_documents.bin` lists them (`DOCUMENT`) where a later build may use their tokens again (`known`).
* Chats, `ROOT/SOURCE/`: `{train,val}_input_ids.bin` (uint16), `_labels.bin` (int32, not shifted, -100 where a token is
  no target) and `_idx.npy` (int64, where each conversation starts).
* Byte streams of the first generation, `ROOT/SOURCE_SPLIT.bin`, are read only.

A cache appears as a whole folder or not at all (`folder`), and is checked before it is used (`integrity`). Caches that
were published without hashes open as well, after the checks that their files allow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from niels_gpt.batching import TokenStream
from niels_gpt.cache.folder import whole_folder
from niels_gpt.cache.integrity import build_advice, check_tokenizer, open_folder

TOKEN_DTYPE, LABEL_DTYPE = "uint16-le", "int32-le"

TOKEN, LABEL, _BYTE = np.dtype("<u2"), np.dtype("<i4"), np.dtype("u1")
DOCUMENT = np.dtype([("digest", "V16"), ("end", "<i8")])  # half of its text's sha256; where its tokens end in the split


def digest_of(text: bytes) -> bytes:
    """What a text is known by in an index of documents."""
    return hashlib.sha256(text).digest()[:16]


def index_name(split: str) -> str:
    """The file that lists the documents of a split."""
    return f"{split}_documents.bin"


def open_pretrain(
    root: str | Path,
    source: str,
    split: str,
    *,
    tokenizer_sha256: str | None,
    vocab_size: int,
    special_token_ids: Mapping[str, int] | None = None,
    verify: bool = False,
) -> TokenStream:
    """One split of a pretraining cache, mapped, not read. Stubs and empty splits are streams of 0 tokens.

    `tokenizer_sha256` is the tokenizer's (None for bytes), `vocab_size` the model's V.

    Raises:
        FileNotFoundError: there is no such cache, or files of it are missing; the text has the command that builds it.
        ValueError: it is damaged, or was built with another tokenizer or a larger vocabulary.
    """
    flat = Path(root) / f"{source}_{split}.bin"
    if flat.is_file() and not whole_folder(Path(root) / source).is_dir():
        return _open_bytes(flat, source, tokenizer_sha256)
    folder, meta, advice = open_folder(root, source, verify=verify)
    check_tokenizer(folder, meta, advice, tokenizer_sha256, vocab_size, special_token_ids)
    if "files" in meta:
        shards = sorted(folder / name for name in meta["files"] if name.startswith(f"{split}/"))
    else:
        shards = sorted((folder / split).glob("shard_*.bin"))
    arrays = [_map(path, TOKEN, advice) for path in shards]
    n_tokens = sum(map(len, arrays))
    expected = meta.get(f"{split}_tokens", n_tokens)
    if not shards or n_tokens != expected:
        raise ValueError(f"{folder / split} holds {n_tokens} tokens, {expected} were written; {advice}")
    if "files" not in meta:
        for path, array in zip(shards, arrays, strict=True):
            _check_range(path, array, min(vocab_size, meta.get("vocab_size", vocab_size)), advice)
    return TokenStream([array for array in arrays if len(array)], source)


def _open_bytes(path: Path, source: str, tokenizer_sha256: str | None) -> TokenStream:
    advice = build_advice(path.parent / source)
    if tokenizer_sha256 is not None:
        raise ValueError(f"{path} holds bytes, which only byte models can read; {advice}")
    return TokenStream([_map(path, _BYTE, advice)], source)


@dataclass(frozen=True)
class SftExamples:
    """Conversations on disk: `ids` and `labels` of all of them in a row, `idx` where each one starts."""

    ids: np.ndarray  # uint16
    labels: np.ndarray  # int32
    idx: np.ndarray  # int64
    name: str

    def __len__(self) -> int:
        return len(self.idx)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and labels of conversation i, int64, of one length; `labels[j]` belongs to `ids[j]`."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} conversations, there is no number {i}")
        stop = self.idx[i + 1] if i + 1 < len(self) else len(self.ids)
        span = slice(self.idx[i], stop)
        return self.ids[span].astype(np.int64), self.labels[span].astype(np.int64)


def open_sft(
    root: str | Path,
    source: str,
    split: str,
    *,
    tokenizer_sha256: str | None,
    vocab_size: int,
    special_token_ids: Mapping[str, int] | None = None,
    allow_missing_idx: bool = False,
    verify: bool = False,
) -> SftExamples:
    """One split of a chat cache, mapped, not read.

    `allow_missing_idx` takes a split without its index as one long conversation, with a printed line. The older name
    `SPLIT_tokens.bin` of the token file is accepted. Errors are those of `open_pretrain`.
    """
    idx_name = f"{split}_idx.npy"
    folder, meta, advice = open_folder(root, source, verify=verify, optional=[idx_name] if allow_missing_idx else [])
    check_tokenizer(folder, meta, advice, tokenizer_sha256, vocab_size, special_token_ids)
    older = folder / f"{split}_tokens.bin"
    ids_path = older if older.is_file() else folder / f"{split}_input_ids.bin"
    labels_path, idx_path = folder / f"{split}_labels.bin", folder / idx_name
    needed = [ids_path, labels_path] + ([] if allow_missing_idx else [idx_path])
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise FileNotFoundError(f"missing from the cache: {', '.join(missing)}; {advice}")
    ids, labels = _map(ids_path, TOKEN, advice), _map(labels_path, LABEL, advice)
    if len(ids) != len(labels):
        raise ValueError(f"{ids_path} holds {len(ids)} tokens, {labels_path.name} {len(labels)} labels; {advice}")
    if idx_path.is_file():
        idx = _read_idx(idx_path, len(ids), advice)
        if len(idx) != (expected := meta.get(f"{split}_examples", len(idx))):
            raise ValueError(f"{idx_path} lists {len(idx)} conversations, {expected} were written; {advice}")
    else:
        print(f"{idx_path} is missing: the split is one long conversation, because allow_missing_idx is set")
        idx = np.zeros(min(1, len(ids)), dtype=np.int64)
    if "files" not in meta:
        V = min(vocab_size, meta.get("vocab_size", vocab_size))
        _check_range(ids_path, ids, V, advice)
        _check_range(labels_path, labels, V, advice, least=-100)
    return SftExamples(ids, labels, idx, source)


def _read_idx(path: Path, n_tokens: int, advice: str) -> np.ndarray:
    try:
        idx = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {advice}") from error
    bounds = np.append(idx, n_tokens) if idx.ndim == 1 and idx.dtype.kind == "i" else np.zeros(2)
    if (bounds[0] != 0) or not (np.diff(bounds) > 0).all():
        raise ValueError(f"{path} does not hold rising offsets from 0 to below {n_tokens}; {advice}")
    return idx.astype(np.int64)


def _map(path: Path, dtype: np.dtype, advice: str) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path} is damaged: {size} bytes are not a whole number of {dtype.name} values; {advice}")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)


def _check_range(path: Path, array: np.ndarray, vocab_size: int, advice: str, least: int = 0) -> None:
    if array.size and not least <= array.min() <= array.max() < vocab_size:
        raise ValueError(
            f"{path} holds ids from {array.min()} to {array.max()}, the vocabulary has {vocab_size} pieces; {advice}"
        )
