"""Texts that say the same again: exactly, or nearly. The first of them in order stays.

Candidates for near duplicates come from MinHash and LSH (rensa); what decides is the true Jaccard similarity of their
sets of three-word shingles, so the outcome is exact and the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from niels_gpt.files import sha256_bytes

SHINGLE = 3  # words
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
_PERMUTATIONS = 252  # divisible by many numbers of rows
_ROWS = (12, 9, 7, 6, 4, 3, 2, 1)
_MISSED = 1e-5  # share of pairs at the threshold that LSH may miss
_MARGIN = 0.15  # a MinHash estimate is within four standard deviations of the truth
_BLOCK = 10_000  # shingles held as strings at once
_REMEMBERED = 512  # sets of at most a block kept for the next comparison


def normal_hash(text: str) -> str:
    """Equal for texts that differ in nothing but case and blanks."""
    return sha256_bytes(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"))


def shingles(text: str) -> Iterator[list[str]]:
    """Every run of three words, in blocks; where words are not separated (Chinese, Japanese, Korean), of characters."""
    words = (match.group() for match in _WORD.finditer(text.casefold()))
    last: list[str] = []
    while block := last + list(islice(words, _BLOCK)):
        if len(block) < SHINGLE and last:
            return
        yield [" ".join(block[i : i + SHINGLE]) for i in range(max(1, len(block) - SHINGLE + 1))]
        last = block[1 - SHINGLE :] if len(block) >= SHINGLE else block


def hashed(text: str) -> np.ndarray:
    """The set of a text's shingles as 64-bit hashes, sorted, each once. They mean nothing to another process."""
    blocks = [np.fromiter(map(hash, block), dtype=np.int64) for block in shingles(text)]
    return np.unique(np.concatenate(blocks)) if blocks else np.empty(0, dtype=np.int64)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0


class Duplicate(NamedTuple):
    """What a text repeats: the number of the text that stays, and how similar they are."""

    of: int
    similarity: float
    exact: bool


def find_duplicates(numbers: Iterable[int], text_of: Callable[[int], str], threshold: float) -> dict[int, Duplicate]:
    """Every text to drop by its number, with what it repeats.

    `threshold` 1 leaves near duplicates in. `text_of` is called once per text, and again for candidates. A text is
    compared with those that stay alone: of a chain of texts, each a little different from the one before, several stay.
    """
    first: dict[str, int] = {}
    dropped: dict[int, Duplicate] = {}
    index = _Index(text_of, threshold) if threshold < 1 else None
    for number in numbers:
        text = text_of(number)
        original = first.setdefault(normal_hash(text), number)
        if original != number:
            stays = dropped[original].of if original in dropped else original
            dropped[number] = Duplicate(stays, 1.0, True)
        elif index and (near := index.add(number, text)):
            dropped[number] = near
    return dropped


class _Index:
    """The texts that stay so far, by the LSH bands of their MinHash."""

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        from rensa import RMinHash, RMinHashLSH

        self.threshold = threshold
        rows = next((r for r in _ROWS if (1 - threshold**r) ** (_PERMUTATIONS // r) <= _MISSED), 1)
        self._lsh = RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_PERMUTATIONS // rows)
        self._new = lambda: RMinHash(num_perm=_PERMUTATIONS, seed=0)
        self._hashes: dict[int, Any] = {}
        self._text_of = text_of
        self._recent: dict[int, np.ndarray] = {}

    def add(self, number: int, text: str) -> Duplicate | None:
        """The first text that is near; None, and this one stays, if there is none."""
        minhash = self._new()
        for block in shingles(text):
            minhash.update(block)
        mine: np.ndarray | None = None
        for other in sorted(self._lsh.query(minhash)):
            if minhash.jaccard(self._hashes[other]) >= self.threshold - _MARGIN:
                mine = hashed(text) if mine is None else mine
                similarity = jaccard(mine, self._set_of(other))
                if similarity >= self.threshold:
                    return Duplicate(other, similarity, False)
        self._lsh.insert(number, minhash)
        self._hashes[number] = minhash
        return None

    def _set_of(self, number: int) -> np.ndarray:
        """The shingles of a text that stays; those of recent small ones are kept, since many are near the same few."""
        if number in self._recent:
            return self._recent[number]
        found = hashed(self._text_of(number))
        if len(found) <= _BLOCK:
            if len(self._recent) >= _REMEMBERED:
                self._recent.pop(next(iter(self._recent)))
            self._recent[number] = found
        return found
