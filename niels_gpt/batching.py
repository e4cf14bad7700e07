"""From token arrays to batches: windows of T+1 tokens, drawn by a generator the caller seeds.

A batch depends only on the sources, the mix and the generator's seed (`rng.generator_for`), never on what was drawn
before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from niels_gpt.settings.fields import MIX_TOLERANCE


@dataclass(frozen=True)
class Batch:
    """x, y (B, T) int64, y is -100 where a target does not count; segment (B, T) marks packed conversations."""

    x: Tensor
    y: Tensor
    segment: Tensor | None = None

    def to(self, device: str) -> Batch:
        """The batch on a device; to a GPU it is copied while the program goes on."""
        if device == "cpu":
            return self
        segment = None if self.segment is None else self.segment.to(device, non_blocking=True)
        return Batch(self.x.to(device, non_blocking=True), self.y.to(device, non_blocking=True), segment)


class TokenStream:
    """One source's tokens as 1-D arrays (uint8 bytes, or uint16 shards on disk). Windows never cross arrays."""

    def __init__(self, arrays: Sequence[np.ndarray], name: str) -> None:
        self.arrays = list(arrays)
        self.name = name

    @property
    def num_tokens(self) -> int:
        """Of all arrays."""
        return sum(len(a) for a in self.arrays)

    def windows(self, T: int) -> list[int]:
        """How many windows of T+1 tokens start in each array; ValueError if there is none at all."""
        counts = [max(0, len(a) - T) for a in self.arrays]
        if not any(counts):
            longest = max((len(a) for a in self.arrays), default=0)
            raise ValueError(
                f"source {self.name!r} is too short: {longest} tokens, at least T+1 = {T + 1} needed; "
                "lower T or add data"
            )
        return counts

    def window(self, index: int, T: int, *, array: int = 0) -> np.ndarray:
        """(T+1,) int64 tokens starting at `index` of one array."""
        return self.arrays[array][index : index + T + 1].astype(np.int64)

    def draw(self, T: int, generator: torch.Generator) -> np.ndarray:
        """A uniformly drawn window: an array by its share of tokens (if there are several), then an offset."""
        counts = self.windows(T)
        usable = [i for i, count in enumerate(counts) if count]
        array = usable[0]
        if len(usable) > 1:
            sizes = torch.tensor([len(self.arrays[i]) for i in usable], dtype=torch.float32)
            array = usable[int(torch.multinomial(sizes / sizes.sum(), 1, generator=generator))]
        offset = int(torch.randint(counts[array], (1,), generator=generator)) if counts[array] > 1 else 0
        return self.window(offset, T, array=array)


def check_mix(names: Sequence[str], p: Mapping[str, float]) -> None:
    """ValueError unless `p` names exactly `names` and sums to 1."""
    absent, extra = sorted(set(p) - set(names)), sorted(set(names) - set(p))
    if absent:
        raise ValueError(f"mix names {', '.join(absent)}, missing from sources ({', '.join(sorted(names))})")
    if extra:
        raise ValueError(f"sources {', '.join(extra)} are missing from p ({', '.join(sorted(p))})")
    total = sum(p.values())
    if not abs(total - 1) <= MIX_TOLERANCE:
        raise ValueError(f"the mix must sum to 1.0, not {total:g}: {dict(p)}")


def draw_sources(p: Mapping[str, float], n: int, generator: torch.Generator) -> list[str]:
    """n source names, by weight, with replacement (names in sorted order, float32 weights)."""
    names = sorted(p)
    weights = torch.tensor([p[name] for name in names], dtype=torch.float32)
    return [names[i] for i in torch.multinomial(weights, n, replacement=True, generator=generator).tolist()]


def get_batch(
    sources: Mapping[str, TokenStream | bytes],
    p: Mapping[str, float],
    B: int,
    T: int,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw B windows from the mix: x (B, T) and the next tokens y (B, T), int64 on `device`.

    Raises ValueError when names and weights differ, weights do not sum to 1, or a source is shorter than T+1.
    """
    check_mix(list(sources), p)
    streams = {name: as_stream(source, name) for name, source in sources.items()}
    for stream in streams.values():
        stream.windows(T)
    generator = generator if generator is not None else torch.default_generator
    rows = [streams[name].draw(T, generator) for name in draw_sources(p, B, generator)]
    tokens = torch.from_numpy(np.stack(rows)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def as_stream(source: TokenStream | bytes, name: str) -> TokenStream:
    """Raw UTF-8 bytes are a stream of byte ids."""
    return source if isinstance(source, TokenStream) else TokenStream([np.frombuffer(source, np.uint8)], name)
