"""Writing token caches in the formats that `format` describes and reads: hashed while they are written, whole or not
at all."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt.cache.encode import Block
from niels_gpt.cache.folder import replacing_folder
from niels_gpt.cache.format import DOCUMENT, LABEL, LABEL_DTYPE, TOKEN, TOKEN_DTYPE, index_name
from niels_gpt.cache.integrity import HashedFile, write_meta
from niels_gpt.cache.journal import clear, read_journal, write_journal
from niels_gpt.data.types import SPLITS
from niels_gpt.settings.fields import MAX_VOCAB_SIZE

COMMIT_TOKENS = 8_000_000  # what a kill can cost between two finished shards


class _Writer:
    """What both kinds share: open files, counts per split, meta.json at the end."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary of {vocab_size} pieces does not fit a token cache; the most is {MAX_VOCAB_SIZE}"
            )
        self.meta: dict[str, Any] = {}
        self._folder, self._vocab_size = folder, vocab_size
        self._documents = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._open: dict[str, HashedFile] = {}
        self._entries: dict[str, dict[str, Any]] = {}

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
    """Writes documents as shards; made by `writing_pretrain`.

    With `indexed`, `SPLIT_documents.bin` lists every document (`DOCUMENT`), so that later builds can use its ids.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_bytes: int, indexed: bool) -> None:
        super().__init__(folder, vocab_size)
        if shard_bytes < TOKEN.itemsize:
            raise ValueError(f"shard_bytes must hold at least one token of {TOKEN.itemsize} bytes, got {shard_bytes}")
        self._shard_tokens = shard_bytes // TOKEN.itemsize
        self._indexed = indexed
        self.consumed: dict[str, int] = {}  # documents of each part of the source that are in the cache; for the caller
        self._key: str | None = None
        self._uncommitted = 0

    def start(self, key: str | None) -> None:
        """Begin, or, where the folder has a journal of the build `key`, go on where that one was last durable."""
        self._key = key
        if key is not None and (state := read_journal(self._folder, key)):
            self._tokens, self._documents, self._bytes = state["tokens"], state["documents"], state["bytes"]
            self.consumed, self._entries = state["consumed"], state["files"]
            self._open = {name: HashedFile(self._folder, name, keep) for name, keep in state["open"].items()}
            return
        clear(self._folder)
        for split in SPLITS:
            self._file(self._shard_name(split))  # so that an empty split has its one, empty, shard
            if self._indexed:
                self._file(index_name(split))

    def commit(self, *, everything: bool = False) -> None:
        """Make what is written durable and say so in the journal, if a shard is finished or much was written."""
        if self._key is None or not (everything or self._uncommitted >= COMMIT_TOKENS):
            return
        state = {"tokens": self._tokens, "documents": self._documents, "bytes": self._bytes}
        sizes = {name: file.sync() for name, file in self._open.items()}
        write_journal(
            self._folder, self._key, {**state, "consumed": self.consumed, "files": self._entries, "open": sizes}
        )
        self._uncommitted = 0

    def _shard_name(self, split: str) -> str:
        return f"{split}/shard_{self._tokens[split] // self._shard_tokens:05d}.bin"

    def add_block(self, split: str, block: Block, start: int, stop: int) -> None:
        """Append ids `start` to `stop` of a block. Of a document that is cut, its share of bytes is counted."""
        self._append(split, block.ids[start:stop])
        lengths = np.diff(block.ends, prepend=0)
        inside = np.minimum(block.ends, stop) - np.maximum(block.ends - lengths, start)
        here = (inside > 0) if stop < len(block.ids) or start else np.full(len(block), True)
        self._documents[split] += int(here.sum())
        shares = block.sizes[here] * np.maximum(inside[here], 0) // np.maximum(lengths[here], 1)
        self._bytes[split] += int(shares.sum())
        if self._indexed:
            entries = np.empty(len(block), dtype=DOCUMENT)
            entries["digest"] = np.frombuffer(b"".join(block.digests), dtype="V16")
            entries["end"] = self._tokens[split] - stop + block.ends
            self._file(index_name(split)).write(entries.tobytes())

    def _append(self, split: str, ids: np.ndarray) -> None:
        if ids.size and ids.max() >= self._vocab_size:
            raise ValueError(f"token id {ids.max()} is outside the vocabulary of {self._vocab_size} pieces")
        written = 0
        while written < len(ids):
            name = self._shard_name(split)
            piece = ids[written : written + self._shard_tokens - self._tokens[split] % self._shard_tokens]
            self._file(name).write(piece.astype(TOKEN, copy=False).tobytes())
            written += len(piece)
            self._tokens[split] += len(piece)
            if self._shard_name(split) != name:
                self._close(name)
                self._uncommitted = COMMIT_TOKENS
        self._uncommitted += len(ids)

    def n_tokens(self, split: str) -> int:
        """Tokens written so far, separators included."""
        return self._tokens[split]

    def n_bytes(self) -> int:
        """UTF-8 bytes of text written so far, in all splits."""
        return sum(self._bytes.values())

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Put everything on the disk, with `meta` and the counts as meta.json."""
        self.commit(everything=True)
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
        self._file(f"{split}_labels.bin").write(targets.astype(LABEL).tobytes())
        self._starts[split].append(self._tokens[split])
        self._tokens[split] += len(ids)
        self._targets[split] += int((targets >= 0).sum())
        self._documents[split] += 1
        self._bytes[split] += n_bytes

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self._vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {self._vocab_size} pieces")
        return array.astype(TOKEN)

    def n_examples(self, split: str) -> int:
        """Conversations written so far."""
        return self._documents[split]

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write the indices and put everything on the disk, with `meta` and the counts as meta.json."""
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
    shard_bytes: int,
    indexed: bool = False,
    key: str | None = None,
) -> Iterator[PretrainWriter]:
    """Build a pretraining cache, which becomes `folder` when the block ends well; then `writer.meta` is its meta.json.

    `separator` is the id that ends every document in the blocks, None for none. Keys may be added to `meta` meanwhile.
    With a `key`, which stands for everything that decides the cache's bytes, an interrupted build of the same key goes
    on: `writer.consumed` says how many documents are in it already.
    """
    with replacing_folder(folder, resume=key is not None) as new:
        writer = PretrainWriter(new, vocab_size, shard_bytes, indexed)
        try:
            writer.start(key)
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
