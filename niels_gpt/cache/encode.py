"""From documents to blocks of token ids, in order, on all cores and in bounded memory.

With a tokenizer whose texts may be cut before blanks (`words.cutting`), worker processes encode word by word; Python's
part of that work holds the interpreter's lock, so threads would not help. Any other tokenizer encodes whole texts in
SentencePiece's own threads. The result is the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from niels_gpt.cache import words
from niels_gpt.cache.format import digest_of
from niels_gpt.device import usable_cores
from niels_gpt.special_tokens import assert_no_special_collision
from niels_gpt.tokenizer import Tokenizer
from niels_gpt.unicode import BLANK

BATCH_CHARS = 400_000  # text of a block
BATCH_DOCUMENTS = 4096
PIECE_CHARS = 200_000  # longest text encoded at once word by word
WHOLE_CHARS = 1_000_000  # the same where texts are encoded whole; SentencePiece takes some 50 bytes a character
INLINE_BATCHES = 4  # before worker processes are started
BYTE_SEPARATOR = "\n\n"  # ends a document where the tokenizer has no end id

Encoded = tuple[np.ndarray, np.ndarray]  # ids of several texts in a row (uint16), how many each has (int64)
Lookup = Callable[[bytes], np.ndarray | None]  # digest of a text -> its ids, as they are in a cache


@dataclass
class Block:
    """Some documents in a row: ids with separators, where each document ends, and what the counts need."""

    ids: np.ndarray  # (n,) uint16
    ends: np.ndarray  # (documents,) int64, rising; the last is n
    sizes: np.ndarray  # (documents,) int64, UTF-8 bytes of each text
    digests: list[bytes] = field(default_factory=list)  # first half of each text's sha256, where asked for
    reused: int = 0

    def __len__(self) -> int:
        return len(self.ends)


class Encoder:
    """Encodes the documents of a cache; a context manager, which ends the workers."""

    def __init__(self, tokenizer: Tokenizer, *, separate: bool = True, workers: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._separator = tokenizer.eot_id if separate else None
        self._text_end = BYTE_SEPARATOR if separate and tokenizer.eot_id is None else ""
        self._workers = usable_cores() if workers is None else workers
        self._pool: _Pool | None = None
        self._cutting = None
        if tokenizer.vocab_size <= 2**16 and isinstance(getattr(tokenizer, "model_bytes", None), bytes):
            model: Any = tokenizer
            self._cutting = words.cutting(model.model_bytes, _blank_ids(tokenizer), self._separator)
        self._inline = words.WordEncoder(self._cutting) if self._cutting else None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.close()

    def blocks(
        self, texts: Iterable[str], name: str, *, first: int = 0, lookup: Lookup | None = None
    ) -> Iterator[Block]:
        """Blocks of the encoded texts, in order; `lookup` finds ids that need not be made again.

        Raises ValueError for a special token literal in a text, which is named as a document of `name`; they are
        counted from `first`.
        """
        waiting: deque[tuple[_Batch, Future[Encoded]]] = deque()
        for n, batch in enumerate(_batches(texts, name, first, lookup, self._text_end)):
            waiting.append((batch, self._submit(batch, n)))
            while len(waiting) > (2 * self._workers if self._pool else 0):
                yield self._block(*waiting.popleft())
        while waiting:
            yield self._block(*waiting.popleft())

    def _submit(self, batch: _Batch, n: int) -> Future[Encoded]:
        most = PIECE_CHARS if self._cutting else WHOLE_CHARS
        parts, ends = batch.parts(most)
        if self._cutting and self._pool is None and n >= INLINE_BATCHES and self._workers > 1:
            self._pool = _Pool(self._cutting, self._workers)
        if self._pool:
            return self._pool.submit(parts, ends)
        done: Future[Encoded] = Future()
        done.set_result(self._inline.encode(parts, ends) if self._inline else self._encode_whole(parts, ends))
        return done

    def _encode_whole(self, parts: Sequence[str], ends: Sequence[bool]) -> Encoded:
        # Models that drop blanks at the start of a text would drop those at a cut: there, "." goes before the part.
        lead = len(self._tokenizer.encode(".")) if self._tokenizer.drops_leading_blanks else 0
        inner = [lead > 0 and i > 0 and not ends[i - 1] for i in range(len(parts))]
        encoded: list[np.ndarray] = []
        for a, b in words.groups(parts):
            led = [f".{part}" if cut else part for part, cut in zip(parts[a:b], inner[a:b], strict=True)]
            arrays = self._tokenizer.encode_arrays(led)
            encoded += [ids[lead * cut :].astype(np.uint16) for ids, cut in zip(arrays, inner[a:b], strict=True)]
        if self._separator is not None:
            end = np.array([self._separator], dtype=np.uint16)
            encoded = [np.append(ids, end) if ends[i] else ids for i, ids in enumerate(encoded)]
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.concatenate([np.empty(0, np.uint16), *encoded]), counts

    def _block(self, batch: _Batch, encoded: Future[Encoded]) -> Block:
        ids, counts = encoded.result()
        bounds = np.concatenate([[0], np.cumsum(counts)])
        stops = bounds[np.cumsum(np.array(batch.n_parts, dtype=np.int64))]
        sizes = np.array(batch.sizes, dtype=np.int64)
        if not batch.known:
            return Block(ids, stops, sizes, batch.digests)
        made = iter(np.split(ids, stops[:-1]) if len(stops) else [])
        documents = [batch.known[i] if i in batch.known else next(made) for i in range(len(sizes))]
        return Block(
            np.concatenate(documents), np.cumsum([len(d) for d in documents]), sizes, batch.digests, len(batch.known)
        )


@dataclass
class _Batch:
    """Documents that become a block: the texts that must be encoded, and the ids of those that need not be."""

    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    known: dict[int, np.ndarray] = field(default_factory=dict)
    n_parts: list[int] = field(default_factory=list)  # of each text

    def parts(self, most: int) -> tuple[list[str], list[bool]]:
        """The texts in parts that can be encoded at once, and which of them end a document."""
        parts: list[str] = []
        ends: list[bool] = []
        for text in self.texts:
            cut = [text] if len(text) <= most else list(words.pieces(text, most))
            parts += cut
            ends += [False] * (len(cut) - 1) + [True]
            self.n_parts.append(len(cut))
        self.texts = []
        return parts, ends


def _batches(texts: Iterable[str], name: str, first: int, lookup: Lookup | None, text_end: str) -> Iterator[_Batch]:
    batch, chars = _Batch(), 0
    for index, text in enumerate(texts, start=first):
        assert_no_special_collision(text, dataset=name, doc_index=index, field="text")
        content = text.encode("utf-8", "surrogatepass")
        if lookup is not None:
            batch.digests.append(digest_of(content))
            if (ids := lookup(batch.digests[-1])) is not None:
                batch.known[len(batch.sizes)] = ids
        if len(batch.sizes) not in batch.known:
            batch.texts.append(text + text_end)
        batch.sizes.append(len(content))
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch.sizes) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars = _Batch(), 0
    if batch.sizes:
        yield batch


class _Pool:
    """Worker processes, each asked by one thread at a time. They end with this process, however it ends."""

    def __init__(self, cutting: words.Cutting, size: int) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="encode")
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes = [_start_worker(cutting) for _ in range(size)]
        for process in self._processes:
            self._idle.put(process)

    def submit(self, parts: list[str], ends: list[bool]) -> Future[Encoded]:
        return self._threads.submit(self._ask, parts, ends)

    def _ask(self, parts: list[str], ends: list[bool]) -> Encoded:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((parts, ends), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            reply: Encoded = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            process.wait()
            raise RuntimeError(
                f"a worker process that encodes text ended with status {process.returncode}; "
                "if memory ran out, build with --workers 1; the same command goes on where this one stopped"
            ) from error
        finally:
            self._idle.put(process)  # a dead one too: whoever waits for it must learn of it
        return reply

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _start_worker(cutting: words.Cutting) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", words.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    pickle.dump(cutting, process.stdin)
    process.stdin.flush()
    return process


def _blank_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of a real U+2581 where it survives the tokenizer, else none."""
    ids = tokenizer.encode(BLANK)
    return ids if tokenizer.decode(ids) == BLANK else []
