"""A byte n-gram model with interpolated, modified Kneser-Ney smoothing: the floor that any neural model must beat

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling". The tables are sorted numpy
arrays of n-grams packed into integers, so ten megabytes are counted and scored in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BYTES = 256
START = 256  # the symbol before the first byte of a document
BITS = 9  # of one symbol in a packed n-gram: bytes and START
ORDER = 5
# Discounts of n-grams seen once, twice, and more often, where the counts are too few to estimate any.
FALLBACK = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Table:
    """One order: n-grams with their discounted probability, and contexts with the weight of the order below."""

    grams: np.ndarray  # sorted; the newest symbol is in the lowest bits
    discounted: np.ndarray
    contexts: np.ndarray  # sorted
    backoff: np.ndarray


class KneserNey:
    """P(byte | the document so far, of which the last order - 1 bytes count)."""

    def __init__(self, documents: Iterable[bytes], order: int = ORDER) -> None:
        """Raises ValueError if there is no text, or the order does not fit into 63 bits."""
        if not 1 <= order <= 63 // BITS:
            raise ValueError(f"the order must be 1 to {63 // BITS}, not {order}")
        codes, available = _packed(documents, order)
        if not len(codes):
            raise ValueError("there is no text to count n-grams in")
        order = self.order = int(available.max())  # less than was asked for where every document is that short
        self.tables: list[Table] = []  # order 1 first
        above = np.empty(0, np.int64)
        for k in range(order, 0, -1):
            grams, counts = _adjusted_counts(codes, available, k, above, highest=k == order)
            self.tables.insert(0, _table(grams, counts))
            above = grams

    def log2_probabilities(self, documents: Sequence[bytes]) -> np.ndarray:
        """log2 P of every byte of the documents, one after another."""
        return np.log2(self._probabilities(_packed(documents, self.order)[0]))

    def distribution(self, context: bytes) -> np.ndarray:
        """(256,) P of every next byte of a document that begins with `context`."""
        codes, _ = _packed([context + bytes([b]) for b in range(BYTES)], self.order)
        return self._probabilities(codes[len(context) :: len(context) + 1])  # of their last bytes

    def _probabilities(self, codes: np.ndarray) -> np.ndarray:
        """Contexts that would reach beyond a document's start hold START inside, so no table knows them."""
        p = np.full(len(codes), 1 / BYTES)
        for k, table in enumerate(self.tables, start=1):
            grams = _last(codes, k)
            weight, known = _look_up(table.contexts, table.backoff, grams >> BITS)
            seen, _ = _look_up(table.grams, table.discounted, grams)
            p = np.where(known, seen + weight * p, p)
        return p


def _packed(documents: Iterable[bytes], order: int) -> tuple[np.ndarray, np.ndarray]:
    """For every byte: the last `order` symbols packed into one integer, and how many of them are the document's.

    The context of a document's first byte is START alone: no n-gram reaches further back.
    """
    pieces, lengths = [], []
    for document in documents:
        pieces += [np.array([START], np.int64), np.frombuffer(document, np.uint8).astype(np.int64)]
        lengths.append(len(document))
    symbols = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    place = np.concatenate([np.arange(n + 1) for n in lengths]) if lengths else np.empty(0, np.int64)
    codes = np.zeros(len(symbols), np.int64)
    for back in range(order):
        codes[back:] |= symbols[: len(symbols) - back] << (BITS * back)
    predicted = place > 0
    return codes[predicted], np.minimum(place[predicted] + 1, order)


def _last(codes: np.ndarray, k: int) -> np.ndarray:
    """The newest k symbols of packed n-grams."""
    return codes & ((1 << (BITS * k)) - 1)


def _adjusted_counts(
    codes: np.ndarray, available: np.ndarray, k: int, above: np.ndarray, *, highest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """N-grams of order k with their counts: how often at the highest order, below it after how many symbols.

    An n-gram that begins with START has nothing before it, so it keeps its plain count.
    """
    chosen = available >= k if highest else (available >= k) & (_last(codes, k) >> (BITS * (k - 1)) == START)
    grams, counts = np.unique(_last(codes[chosen], k), return_counts=True)
    if highest:
        return grams, counts
    inner, contexts_before = np.unique(_last(above, k), return_counts=True)
    grams, counts = np.concatenate([grams, inner]), np.concatenate([counts, contexts_before])
    order = np.argsort(grams)
    return grams[order], counts[order]


def discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) what to take from counts of 0, 1, 2 and 3 or more: Chen and Goodman's estimates from counts of counts."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, *FALLBACK])
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    usable = all(0 <= d <= c for c, d in enumerate(found, start=1))
    return np.array([0.0, *(found if usable else FALLBACK)])


def _table(grams: np.ndarray, counts: np.ndarray) -> Table:
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> BITS, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    backoff = np.add.reduceat(taken, first) / totals
    per_gram = np.repeat(totals, np.diff(np.append(first, len(grams))))
    return Table(grams, (counts - taken) / per_gram, contexts, backoff)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value of each wanted key, 0 where it is absent; and which are there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[at] == wanted
    return np.where(found, values[at], 0.0), found
