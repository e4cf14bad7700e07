"""Which texts share a passage: they must be in the same split, or validation would measure memory.

A passage is a run of bytes, for what a model repeats is tokens, and N tokens are never fewer than N bytes in any
tokenizer that loses nothing: whoever shares no run of 50 bytes shares no run of 50 tokens. Words will not do instead:
50 tokens are about 38 English words for a subword tokenizer, but 9 for bytes and none at all in Chinese.

The runs are found by winnowing: of every window of neighbouring hashes of k bytes, the smallest is kept. Equal passages
have equal windows and so keep equal hashes. With k and the window chosen so that they span `run` bytes together, every
shared run of that length is found; shared runs of k bytes or more may be found. Memory is about 1.5 bytes per byte of
text, time is linear.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_WINDOW = 0.2  # share of a run that is the window: longer keeps fewer hashes, but links shorter runs
_SEPARATOR = "\n\n"  # what may follow a text in a stream of bytes
_SEED = 20_240_229
_PARTS = 16  # of the range of hashes, sorted one after the other
_BLOCK = 1 << 20  # bytes hashed at once


def fingerprints(text: str, run: int) -> np.ndarray:
    """The hashes that winnowing keeps of a text, sorted, each once: (n,) uint64; none if it is shorter than `run`."""
    data = np.frombuffer((text + _SEPARATOR).encode("utf-8", "surrogatepass"), dtype=np.uint8)
    window = max(1, int(run * _WINDOW))
    k = run - window + 1
    kept = []
    for start in range(0, max(1, len(data) - run + 1), _BLOCK):
        block = data[start : start + _BLOCK + run - 1]
        if len(block) >= run:
            hashes = _rolling(block, k)
            kept.append(np.unique(sliding_window_view(hashes, window).min(axis=1)))
    return np.unique(np.concatenate(kept)) if kept else np.empty(0, dtype=np.uint64)


def _rolling(data: np.ndarray, k: int) -> np.ndarray:
    """A 64-bit hash of every k neighbouring bytes: a polynomial over random values of the bytes, then mixed."""
    rng = np.random.Generator(np.random.PCG64(_SEED))
    values = rng.integers(0, 2**64, size=256, dtype=np.uint64)
    base = int(rng.integers(0, 2**64, dtype=np.uint64)) | 1  # odd, so that it has an inverse
    powers = _powers(base, len(data))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values[data] * powers, dtype=np.uint64)])
    inverse = _powers(pow(base, -1, 2**64), len(data) - k + 1)
    hashes = (sums[k:] - sums[:-k]) * inverse
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32))


def _powers(base: int, n: int) -> np.ndarray:
    """base**0 .. base**(n-1) modulo 2**64."""
    factors = np.full(n, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def link(prints: Iterable[tuple[int, np.ndarray]], n: int) -> list[int]:
    """Group of each of n texts, named by its smallest number, from (number, fingerprints); others stand alone."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    found = [(number, hashes) for number, hashes in prints if len(hashes)]
    for part in range(_PARTS):  # the hashes of a text are sorted, so a part of all of them is cheap to take
        bounds = np.array([part * (2**64 // _PARTS), (part + 1) * (2**64 // _PARTS) - 1], dtype=np.uint64)
        slices = [
            hashes[np.searchsorted(hashes, bounds[0]) : np.searchsorted(hashes, bounds[1], "right")]
            for _, hashes in found
        ]
        everything = np.concatenate(slices) if slices else np.empty(0, dtype=np.uint64)
        order = np.argsort(everything, kind="stable")
        everything = everything[order]
        owner = np.repeat([number for number, _ in found], [len(one) for one in slices])[order] if slices else order
        same = np.flatnonzero(everything[1:] == everything[:-1])
        for one, other in np.unique(np.stack([owner[same], owner[same + 1]], axis=1), axis=0):
            a, b = root(int(one)), root(int(other))
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(n)]
