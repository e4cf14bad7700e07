"""The order in which training reads its sources: every row once per epoch, mixed by weight, a function of its number.

Row n of a run (counted over all steps) depends on the seed, the sources and n alone. So a resumed run, another number
of processes or another microbatch reads the same rows. Drawing windows with replacement instead, as `get_batch` does,
has read only 1 - 1/e = 63 % of a text by the time it has read as many tokens as the text holds; docs/log.md has what
that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from niels_gpt.batching import Batch, TokenStream, check_mix
from niels_gpt.rng import generator_for

BLOCK = 10_000  # rows in which the mix holds exactly; a weight is rounded to one row of it


class RowSource(Protocol):
    """A source's rows in the order a run reads them, epoch after epoch."""

    def __len__(self) -> int:
        """Rows of an epoch."""
        ...

    def row(self, k: int) -> np.ndarray:
        """The k-th row of a run."""
        ...


class Shuffled:
    """The items of a source, each once per epoch, in an order that each epoch draws anew.

    With `backwards`, every epoch is read from its end: what a run that shares the seed has not reached comes first.
    """

    def __init__(self, n: int, seed: int, name: str, *, backwards: bool = False) -> None:
        self.n, self.seed, self.name, self.backwards = n, seed, name, backwards
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self.generator = torch.Generator()  # of the epoch of the last item, after its order was drawn

    def item(self, k: int) -> int:
        """Which item is the k-th of a run."""
        epoch, i = divmod(k, self.n)
        if epoch != self._epoch:
            self.generator = generator_for(self.seed, f"epoch/{self.name}", epoch)
            self._order = torch.randperm(self.n, generator=self.generator).numpy()
            self._epoch = epoch
        return int(self._order[-1 - i] if self.backwards else self._order[i])


class Epochs:
    """A text's windows of T+1 tokens in epochs: each epoch cuts the text at another phase and shuffles the pieces."""

    def __init__(self, stream: TokenStream, T: int, seed: int, *, backwards: bool = False) -> None:
        stream.windows(T)  # too short a source is refused here
        self.stream, self.T = stream, T
        # How many windows that do not overlap (but for the last token) each array holds; later ones start above it.
        self._ends = np.cumsum([(len(a) - 1) // T for a in stream.arrays])
        self._shuffled = Shuffled(len(self), seed, stream.name, backwards=backwards)
        self._phase: tuple[int, int] = (-1, 0)  # epoch, and where its first window starts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, k: int) -> np.ndarray:
        """(T+1,) int64: the k-th window of a run."""
        piece, epoch = self._shuffled.item(k), k // len(self)
        if epoch != self._phase[0]:
            self._phase = epoch, int(torch.randint(self.T, (1,), generator=self._shuffled.generator))
        array = int(np.searchsorted(self._ends, piece, side="right"))
        before = int(self._ends[array - 1]) if array else 0
        last = len(self.stream.arrays[array]) - self.T - 1
        start = min((piece - before) * self.T + self._phase[1], last)
        return self.stream.window(start, self.T, array=array)


class MixedRows:
    """Rows of a mix of sources: BLOCK rows at a time hold every source by its weight, in shuffled order."""

    def __init__(self, sources: Mapping[str, RowSource], mix: Mapping[str, float], seed: int) -> None:
        check_mix(list(sources), mix)
        self.seed = seed
        names = sorted(name for name in mix if mix[name] > 0)
        self.sources = [sources[name] for name in names]
        self.quotas = block_quotas([mix[name] for name in names])
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def row(self, n: int) -> np.ndarray:
        """Row n of the run, in the shape its source gives it."""
        block, i = divmod(n, BLOCK)
        if block != self._block[0]:
            self._block = (block, *self._arranged(block))
        _, sources, ranks = self._block
        source = int(sources[i])
        return self.sources[source].row(block * self.quotas[source] + int(ranks[i]))

    def _arranged(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which source each row of a block is of, and how many rows of that source came before it in the block."""
        generator = generator_for(self.seed, "mix", block)
        order = torch.randperm(BLOCK, generator=generator).numpy()
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
        ranks = np.empty(BLOCK, np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


class TextRows:
    """Windows of a mix of texts, as batches."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        mix: Mapping[str, float],
        T: int,
        seed: int,
        *,
        backwards: bool = False,
    ) -> None:
        sources = {name: Epochs(stream, T, seed, backwards=backwards) for name, stream in streams.items()}
        self.mixed = MixedRows(sources, mix, seed)

    def row(self, n: int) -> np.ndarray:
        """(T+1,) int64: row n of the run."""
        return self.mixed.row(n)

    def batch(self, first: int, rows: int) -> Batch:
        """Rows first .. first + rows - 1 of the run."""
        tokens = torch.from_numpy(np.stack([self.row(n) for n in range(first, first + rows)]))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def block_quotas(weights: list[float]) -> list[int]:
    """Rows of each source in a block: BLOCK shared out by largest remainder, and no source left with none."""
    exact = np.array(weights) / sum(weights) * BLOCK
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for source in by_remainder[: max(0, BLOCK - int(quotas.sum()))]:
        quotas[source] += 1
    quotas[int(quotas.argmax())] -= int(quotas.sum()) - BLOCK  # rows that tiny weights were given
    return [int(q) for q in quotas]
