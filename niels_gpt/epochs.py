"""The order in which training reads text: every window once per epoch, mixed by weight, a function of the row's number.

Row n of a run (counted over all steps) depends on the seed, the sources and n alone. So a resumed run, another number
of processes or another microbatch reads the same rows. Drawing windows with replacement instead, as `get_batch` does,
has read only 1 - 1/e = 63 % of a text by the time it has read as many tokens as the text holds; docs/log.md has what
that costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from niels_gpt.batching import Batch, TokenStream, check_mix
from niels_gpt.rng import generator_for

BLOCK = 10_000  # rows in which the mix holds exactly; a weight is rounded to one row of it


class Epochs:
    """One source's windows of T+1 tokens in epochs: each epoch cuts the text at another phase and shuffles the pieces.

    With `backwards`, every epoch is read from its end: what a run that shares the seed has not reached comes first.
    """

    def __init__(self, stream: TokenStream, T: int, seed: int, *, backwards: bool = False) -> None:
        stream.windows(T)  # too short a source is refused here
        self.stream, self.T, self.seed, self.backwards = stream, T, seed, backwards
        # How many windows that do not overlap (but for the last token) each array holds; later ones start above it.
        self._ends = np.cumsum([(len(a) - 1) // T for a in stream.arrays])
        self._order: tuple[int, np.ndarray, int] = (-1, np.empty(0, np.int64), 0)  # epoch, permutation, phase

    def __len__(self) -> int:
        return int(self._ends[-1])

    def window(self, k: int) -> np.ndarray:
        """(T+1,) int64: the k-th window of a run."""
        epoch, i = divmod(k, len(self))
        if epoch != self._order[0]:
            generator = generator_for(self.seed, f"epoch/{self.stream.name}", epoch)
            order = torch.randperm(len(self), generator=generator).numpy()
            self._order = epoch, order, int(torch.randint(self.T, (1,), generator=generator))
        _, order, phase = self._order
        piece = int(order[-1 - i] if self.backwards else order[i])
        array = int(np.searchsorted(self._ends, piece, side="right"))
        before = int(self._ends[array - 1]) if array else 0
        last = len(self.stream.arrays[array]) - self.T - 1
        return self.stream.window(min((piece - before) * self.T + phase, last), self.T, array=array)


class MixedRows:
    """Rows of a mix of sources: BLOCK rows at a time hold every source by its weight, in shuffled order."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        mix: Mapping[str, float],
        T: int,
        seed: int,
        *,
        backwards: bool = False,
    ) -> None:
        check_mix(list(streams), mix)
        self.seed = seed
        self.names = sorted(name for name in mix if mix[name] > 0)
        self.epochs = [Epochs(streams[name], T, seed, backwards=backwards) for name in self.names]
        self.quotas = block_quotas([mix[name] for name in self.names])
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def batch(self, first: int, rows: int) -> Batch:
        """Rows first .. first + rows - 1 of the run."""
        tokens = torch.from_numpy(np.stack(list(self._rows(first, rows))))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _rows(self, first: int, rows: int) -> Iterator[np.ndarray]:
        for n in range(first, first + rows):
            block, i = divmod(n, BLOCK)
            if block != self._block[0]:
                self._block = (block, *self._arranged(block))
            _, sources, ranks = self._block
            source = int(sources[i])
            yield self.epochs[source].window(block * self.quotas[source] + int(ranks[i]))

    def _arranged(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which source each row of a block is of, and how many rows of that source came before it in the block."""
        generator = generator_for(self.seed, "mix", block)
        order = torch.randperm(BLOCK, generator=generator).numpy()
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        ranks = np.empty(BLOCK, np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


def block_quotas(weights: list[float]) -> list[int]:
    """Rows of each source in a block: BLOCK shared out by largest remainder, and no source left with none."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for source in by_remainder[: max(0, BLOCK - int(quotas.sum()))]:
        quotas[source] += 1
    quotas[int(quotas.argmax())] -= int(quotas.sum()) - BLOCK  # rows that tiny weights were given
    return [int(q) for q in quotas]
