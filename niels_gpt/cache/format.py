"""The on-disk formats of token caches: written and read here and nowhere else.

* Pretraining, `ROOT/SOURCE/`: `{train,val}/shard_%05d.bin`, uint16 little-endian tokens. Documents run across shards.
* Chats, `ROOT/SOURCE/`: `{train,val}_input_ids.bin` (uint16), `_labels.bin` (int32, not shifted, -100 where a token is
  no target) and `_idx.npy` (int64, where each conversation starts).
* Byte streams of the first generation, `ROOT/SOURCE_SPLIT.bin`, are read only.

A cache appears as a whole folder or not at all (`folder`), and is checked before it is used (`integrity`). Caches that
were published without hashes open as well, after the checks that their files allow.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt.batching import TokenStream
from niels_gpt.cache.folder import replacing_folder, whole_folder
from niels_gpt.cache.integrity import HashedFile, build_advice, check_tokenizer, open_folder, write_meta

SPLITS = ("train", "val")
TOKEN_DTYPE, LABEL_DTYPE = "uint16-le", "int32-le"
DEFAULT_SHARD_BYTES = 128 * 1024 * 1024
MAX_VOCAB = 65535

_TOKEN, _LABEL, _BYTE = np.dtype("<u2"), np.dtype("<i4"), np.dtype("u1")


# Writing


class _Writer:
    """What both kinds share: open files, counts per split, meta.json at the end."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"a vocabulary of {vocab_size} pieces does not fit a token cache; the most is {MAX_VOCAB}")
        self.meta: dict[str, Any] = {}
        self._folder, self._vocab_size = folder, vocab_size
        self._documents = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._open: dict[str, HashedFile] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self._vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {self._vocab_size} pieces")
        return array.astype(_TOKEN)

    def _file(self, name: str) -> HashedFile:
        if name not in self._open:
            self._open[name] = HashedFile(self._folder, name)
        return self._open[name]

    def _close(self, name: str) -> None:
        self._entries[name] = self._open[name].finish()
        del self._open[name]

    def _finish(self, meta: Mapping[str, Any]) -> None:
        for name in list(self._open):
            self._close(name)
        self.meta = {
            **meta,
            "vocab_size": self._vocab_size,
            "token_dtype": TOKEN_DTYPE,
            "documents": self._documents,
            "bytes": self._bytes,
            "files": self._entries,
        }
        write_meta(self._folder, self.meta)

    def _abandon(self) -> None:
        for file in self._open.values():
            file.abandon()


class PretrainWriter(_Writer):
    """Writes documents as shards; made by `writing_pretrain`."""

    def __init__(self, folder: Path, vocab_size: int, separator: int | None, shard_bytes: int) -> None:
        super().__init__(folder, vocab_size)
        if shard_bytes < _TOKEN.itemsize:
            raise ValueError(f"shard_bytes must hold at least one token of {_TOKEN.itemsize} bytes, got {shard_bytes}")
        self._separator = [] if separator is None else [separator]
        self._shard_tokens = shard_bytes // _TOKEN.itemsize
        for split in SPLITS:
            self._file(self._shard_name(split))  # so that an empty split has its one, empty, shard

    def _shard_name(self, split: str) -> str:
        return f"{split}/shard_{self._tokens[split] // self._shard_tokens:05d}.bin"

    def add(self, split: str, ids: Sequence[int], n_bytes: int, *, start: int = 0, limit: int | None = None) -> int:
        """Append a document and its separator, or `limit` of these tokens from `start` on; returns how many.

        `n_bytes` is the size of the document's text in UTF-8; of a part, its share is counted.
        """
        document = self._ids([*ids, *self._separator])
        part = document[start:] if limit is None else document[start:][:limit]
        written = 0
        while written < len(part):
            name = self._shard_name(split)
            piece = part[written : written + self._shard_tokens - self._tokens[split] % self._shard_tokens]
            self._file(name).write(piece.tobytes())
            written += len(piece)
            self._tokens[split] += len(piece)
            if self._shard_name(split) != name:
                self._close(name)
        if written:
            self._documents[split] += 1
            self._bytes[split] += n_bytes * written // len(document)
        return written

    def n_tokens(self, split: str) -> int:
        return self._tokens[split]

    def finish(self, meta: Mapping[str, Any]) -> None:
        self._finish({**meta, **{f"{split}_tokens": count for split, count in self._tokens.items()}})


class SftWriter(_Writer):
    """Writes labelled conversations; made by `writing_sft`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        super().__init__(folder, vocab_size)
        self._starts: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._targets = dict.fromkeys(SPLITS, 0)
        for split, part in itertools.product(SPLITS, ("input_ids", "labels")):
            self._file(f"{split}_{part}.bin")

    def add(self, split: str, ids: Sequence[int], labels: Sequence[int], n_bytes: int) -> None:
        """Append one conversation: `labels[i]` belongs to `ids[i]`, `n_bytes` of UTF-8 text are its targets."""
        if len(ids) != len(labels) or not len(ids):
            raise ValueError(f"{len(ids)} tokens, {len(labels)} labels; a conversation needs equally many, at least 1")
        targets = np.asarray(labels, dtype=np.int64)
        self._file(f"{split}_input_ids.bin").write(self._ids(ids).tobytes())
        self._file(f"{split}_labels.bin").write(targets.astype(_LABEL).tobytes())
        self._starts[split].append(self._tokens[split])
        self._tokens[split] += len(ids)
        self._targets[split] += int((targets >= 0).sum())
        self._documents[split] += 1
        self._bytes[split] += n_bytes

    def n_examples(self, split: str) -> int:
        return self._documents[split]

    def finish(self, meta: Mapping[str, Any]) -> None:
        counts: dict[str, Any] = {"label_dtype": LABEL_DTYPE, "splits": {}}
        for split in SPLITS:
            buffer = io.BytesIO()
            np.save(buffer, np.array(self._starts[split], dtype=np.int64))
            self._file(f"{split}_idx.npy").write(buffer.getvalue())
            counts[f"{split}_examples"] = self._documents[split]
            counts["splits"][split] = {
                "num_examples": self._documents[split],
                "num_tokens": self._tokens[split],
                "num_label_tokens": self._targets[split],
            }
        self._finish({**meta, **counts})


@contextmanager
def writing_pretrain(
    folder: Path,
    meta: dict[str, Any],
    *,
    vocab_size: int,
    separator: int | None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Iterator[PretrainWriter]:
    """Build a pretraining cache, which becomes `folder` when the block ends well; then `writer.meta` is its meta.json.

    `separator` is the id written after every document, None for none. Keys may be added to `meta` inside the block.
    """
    with replacing_folder(folder) as new:
        writer = PretrainWriter(new, vocab_size, separator, shard_bytes)
        try:
            yield writer
            named = None if separator is None else "eot"
            writer.finish({**meta, "shard_bytes": shard_bytes, "document_separator": named})
        finally:
            writer._abandon()


@contextmanager
def writing_sft(folder: Path, meta: dict[str, Any], *, vocab_size: int) -> Iterator[SftWriter]:
    """Build a chat cache, which becomes `folder` when the block ends well; then `writer.meta` is its meta.json."""
    with replacing_folder(folder) as new:
        writer = SftWriter(new, vocab_size)
        try:
            yield writer
            writer.finish(meta)
        finally:
            writer._abandon()


# Reading


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
    arrays = [_map(path, _TOKEN, advice) for path in shards]
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
    ids, labels = _map(ids_path, _TOKEN, advice), _map(labels_path, _LABEL, advice)
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
