"""From one row of logits to one token id: penalties, filters and the draw.

Pure functions of CPU tensors (V,): no model, no text. The draw uses a CPU generator, so a seed means the same on every
device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; ValueError for values that make no sense."""

    temperature: float  # 0 = always the likeliest token
    top_k: int | None = None  # None or 0 = off
    top_p: float | None = None  # None or 0 = off
    repetition_penalty: float | None = None  # None or 1 = off; above 1 discourages tokens already seen

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be >= 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 switches it off), not {self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1 (0 switches it off), not {self.top_p}")
        penalty = self.repetition_penalty
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0 (1 switches it off), not {penalty}")


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Logits (..., V) with all but the k largest set to -inf: exactly min(k, V) survive, also among equals."""
    values, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, index, values)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with all but the likeliest tokens set to -inf: the fewest whose mass is >= p, at least one.

    Nucleus sampling (Holtzman et al. 2020).
    """
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1, dtype=torch.float64)
    mass_before = probs.cumsum(dim=-1) - probs
    drop = mass_before >= p
    drop[..., 0] = False
    return torch.empty_like(logits).scatter(-1, index, ordered.masked_fill(drop, -math.inf))


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens (bool, V) less likely: positive logits divided by the penalty, negative ones multiplied.

    Method: CTRL (Keskar et al. 2019), with the sign handled so that a penalty never favours a token.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_next_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One id from logits (V,): temperature, top-k, top-p, softmax, then a draw on the CPU (temperature 0: argmax)."""
    return draw(logits, Sampling(temperature, top_k, top_p), generator)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """As `sample_next_token`, with the settings in one record (its repetition penalty is not applied here)."""
    assert logits.ndim == 1, f"logits must be one row (V,), got {tuple(logits.shape)}"
    greedy = int(logits.argmax())
    if sampling.temperature == 0:
        return greedy
    logits = logits.float().cpu() / sampling.temperature
    if not logits[greedy].isfinite():  # a temperature so small that the division overflows
        return greedy
    if sampling.top_k:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p:
        logits = top_p_filter(logits, sampling.top_p)
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


class Chooser:
    """Chooses the tokens of one text: bans, then the repetition penalty, then the draw; remembers what it has seen."""

    def __init__(
        self, sampling: Sampling, ids: list[int], banned: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """ids: the prompt. banned: (V,) bool."""
        self._sampling, self._banned, self._generator = sampling, banned, generator
        self._seen = torch.zeros_like(banned)
        self._seen[ids] = True

    def choose(self, logits: Tensor) -> int:
        """The next id from raw logits (V,)."""
        logits = logits.masked_fill(self._banned, -math.inf)
        penalty = self._sampling.repetition_penalty
        if penalty is not None and penalty != 1:
            logits = penalize_repetition(logits, self._seen, penalty)
        token_id = draw(logits, self._sampling, self._generator)
        self._seen[token_id] = True
        return token_id
