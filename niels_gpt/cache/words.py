"""Encoding many texts word by word: a word that was seen before costs a look-up instead of a run of SentencePiece.

No piece of the tokenizers trained here reaches across the blank before a word, and BPE merges pieces only into other
pieces. So a text may be cut before every run of blanks, and its ids are those of its parts. `cutting` says whether that
holds for a tokenizer; for another the texts are encoded whole.

    python -m niels_gpt.cache.words

is a worker process of `encode`: pickled texts come in, arrays go out, until the input ends. So this file imports
neither torch nor settings, nor what does: a worker starts in a moment and needs some 60 MB.
"""

from __future__ import annotations

import pickle
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

import numpy as np
import sentencepiece

from niels_gpt.unicode import BLANK, valid_unicode

MEMORY_TOKENS = 2_000_000  # ids of known words that are kept, some 80 MB with the words
GROUP_CHARS = 1_000_000
_TOGETHER = 256  # new words encoded as one text
_PROBE = "ﬁ ½ ① ﾊﾝｶｸ \u3000 e\u0301 A\u030a \u200b\u00ad \r\n\t  x  "  # what normalisers change
_runs = re.compile(" *[^ ]+| +").findall


@dataclass(frozen=True)
class Cutting:
    """All that a process needs to encode: the model, the ids of a real U+2581, and what ends a document."""

    model: bytes
    blank_ids: tuple[int, ...]
    separator: int | None


def cutting(model: bytes, blank_ids: Sequence[int], separator: int | None) -> Cutting | None:
    """A `Cutting` if texts may be cut before blanks without a change of their ids, else None.

    That takes BPE (its scores count down in whole numbers), text taken as it is, and no piece with a blank inside.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.get_piece_size())
    normal = [i for i in ids if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))]
    is_cuttable = (
        len(blank_ids) > 0
        and all(sp.get_score(i).is_integer() for i in normal)
        and not any(BLANK in sp.id_to_piece(i).lstrip(BLANK) for i in normal)
        and sp.normalize(_PROBE) == _PROBE.replace(" ", BLANK)
    )
    return Cutting(model, tuple(blank_ids), separator) if is_cuttable else None


Word = str | tuple[str]  # a word after one blank; in a tuple, a part of a text as it is


def _words(text: str) -> list[Word]:
    if "  " in text:
        return list(zip(_runs(text), strict=False))
    split: list[Word] = list(text.split(" "))  # five times as fast as the expression
    split[0] = (str(split[0]),)
    return split


class _Known(dict[Word, int]):
    """Words by number. A look-up of a new one numbers it and notes it: in `new`, or if it takes care in `odd`."""

    def __init__(self) -> None:
        self.new: list[str] = []
        self.new_numbers: list[int] = []
        self.odd: list[str] = []
        self.odd_numbers: list[int] = []

    def __missing__(self, word: Word) -> int:
        self[word] = number = len(self)
        if isinstance(word, tuple) or not word or BLANK in word:
            self.odd.append(word[0] if isinstance(word, tuple) else f" {word}")
            self.odd_numbers.append(number)
        else:
            self.new.append(word)
            self.new_numbers.append(number)
        return number


class WordEncoder:
    """Encodes texts by a `Cutting`. What it remembers changes how long that takes, never the result."""

    def __init__(self, cutting: Cutting) -> None:
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=cutting.model, num_threads=1)
        self._blank_ids = np.array(cutting.blank_ids, dtype=np.uint16)
        self._separator = [] if cutting.separator is None else [cutting.separator]
        pieces = (self._sp.id_to_piece(i) for i in range(self._sp.get_piece_size()))
        self._opens_word = np.array([piece.startswith(BLANK) for piece in pieces])
        self._forget()

    def _forget(self) -> None:
        self._known = _Known()
        self._starts = np.empty(0, dtype=np.int64)
        self._lengths = np.empty(0, dtype=np.int64)
        self._ids = np.empty(0, dtype=np.uint16)

    def encode(self, texts: Sequence[str], ends: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts in a row, uint16; how many each has, int64); after a text that `ends`, the separator."""
        done = [self._encode(texts[a:b], ends[a:b]) for a, b in groups(texts)]
        ids = np.concatenate([np.empty(0, np.uint16), *(ids for ids, _ in done)])
        return ids, np.concatenate([np.empty(0, np.int64), *(counts for _, counts in done)])

    def _encode(self, texts: Sequence[str], ends: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        words = [_words(text) for text in texts]
        n_words = np.fromiter(map(len, words), np.int64, len(words))
        numbers = np.fromiter(map(self._known.__getitem__, chain.from_iterable(words)), np.int64, int(n_words.sum()))
        self._learn()
        lengths = self._lengths[numbers]
        stops = np.cumsum(lengths)
        total = int(stops[-1]) if len(stops) else 0
        places = np.repeat(self._starts[numbers] - (stops - lengths), lengths)
        places += np.arange(total)
        ids = self._ids[places]
        bounds = np.concatenate([[0], stops])[np.concatenate([[0], np.cumsum(n_words)])]
        if len(self._ids) > MEMORY_TOKENS:
            self._forget()
        counts = np.diff(bounds)
        if self._separator and any(ends):
            ending = np.flatnonzero(np.fromiter(ends, bool, len(texts)))
            ids = np.insert(ids, bounds[ending + 1], self._separator[0])
            counts[ending] += 1
        return ids, counts

    def _learn(self) -> None:
        """Encode the words that were looked up for the first time."""
        known, n_ids = self._known, len(self._ids)
        if len(known) == len(self._lengths):
            return
        new, new_lengths = self._encode_new(known.new)
        odd = [self._around_blanks(valid_unicode(word)) for word in known.odd]
        added = np.empty(len(known) - len(self._lengths), dtype=np.int64)
        order = np.array(known.new_numbers + known.odd_numbers, dtype=np.int64) - len(self._lengths)
        lengths = np.concatenate([new_lengths, np.fromiter(map(len, odd), np.int64, len(odd))])
        added[order] = lengths
        self._lengths = np.concatenate([self._lengths, added])
        starts = np.empty_like(added)
        starts[order] = n_ids + np.cumsum(lengths) - lengths
        self._starts = np.concatenate([self._starts, starts])
        self._ids = np.concatenate([self._ids, new, *odd])
        for noted in (known.new, known.new_numbers, known.odd, known.odd_numbers):
            noted.clear()

    def _encode_new(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, lengths) of words that each follow one blank: many at once, told apart by the pieces with a blank."""
        joined = [" " + " ".join(words[i : i + _TOGETHER]) for i in range(0, len(words), _TOGETHER)]
        encoded = self._sp.encode([valid_unicode(text) for text in joined], return_type="numpy")
        ids = np.concatenate([np.empty(0, np.uint16), *encoded]).astype(np.uint16)
        starts = np.flatnonzero(self._opens_word[ids])
        assert len(starts) == len(words), "a piece with a blank inside; `cutting` excludes them"
        return ids, np.diff(starts, append=len(ids))

    def _around_blanks(self, word: str) -> np.ndarray:
        head, *rest = self._sp.encode(word.split(BLANK), return_type="numpy")
        return np.concatenate([head, *chain.from_iterable((self._blank_ids, ids) for ids in rest)]).astype(np.uint16)


def groups(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of texts that are encoded at once: the parts of a long document take their turn."""
    start = chars = 0
    for i, text in enumerate(texts):
        if i > start and chars + len(text) > GROUP_CHARS:
            yield start, i
            start, chars = i, 0
        chars += len(text)
    if start < len(texts):
        yield start, len(texts)


def work(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer pickled requests, a `Cutting` first, then (texts, ends), until the input ends."""
    encoder = WordEncoder(pickle.load(requests))
    while True:
        try:
            texts, ends = pickle.load(requests)
        except EOFError:
            return
        ids, counts = encoder.encode(texts, ends)
        pickle.dump((ids, counts), replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


def pieces(text: str, most: int) -> Iterable[str]:
    """A text in parts of at most `most` characters: cut before blanks, or, where there are none, anywhere.

    The ids of the parts are those of the text, except at a cut inside a run of `most` characters without a blank.
    """
    start = 0
    while len(text) - start > most:
        stop = text.rfind(" ", start + 1, start + most)
        while stop > start and text[stop - 1] == " ":
            stop -= 1
        if stop <= start:
            stop = start + most
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    work(sys.stdin.buffer, sys.stdout.buffer)
