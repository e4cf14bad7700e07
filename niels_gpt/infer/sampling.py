"""From one row of logits to one token id: penalties, filters and the draw.

Pure functions of CPU tensors (V,): no model, no text. The draw uses a CPU generator, so a seed means the same on every
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from niels_gpt.settings import GenerationSettings


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; ValueError for values that make no sense."""

    temperature: float  # 0 = always the likeliest token
    top_k: int | None = None  # None or 0 = off
    top_p: float | None = None  # None or 0 = off
    repetition_penalty: float | None = None  # None or 1 = off; above 1 discourages tokens already seen
    min_p: float | None = None  # None or 0 = off; drops tokens below this share of the likeliest one's probability

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be >= 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 switches it off), not {self.top_k}")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1 (0 switches it off), not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1 (0 switches it off), not {self.min_p}")
        penalty = self.repetition_penalty
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"repetition_penalty must be above 0 (1 switches it off), not {penalty}")

    @classmethod
    def of(cls, settings: GenerationSettings) -> Sampling:
        """What the settings of generation ask for."""
        s = settings
        return cls(s.temperature, s.top_k, s.top_p, s.repetition_penalty, s.min_p)


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


def min_p_filter(logits: Tensor, p: float) -> Tensor:
    """Logits (..., V) with every token below p times the likeliest one's probability -inf (Nguyen et al. 2024)."""
    best = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill((logits < best + math.log(p)) & (logits < best), -math.inf) if p > 0 else logits


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
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One id from logits (V,), drawn on the CPU after `shape` (temperature 0: argmax)."""
    sampling = Sampling(temperature, top_k, top_p, min_p=min_p)
    return draw(shape(logits, sampling), generator) if temperature else int(logits.argmax())


def shape(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) of the distribution that is drawn from: temperature, then top-k, then top-p, then min-p.

    The repetition penalty is not applied here. At temperature 0, or one so small that the division overflows, only the
    likeliest token is left.
    """
    assert logits.ndim == 1, f"logits must be one row (V,), got {tuple(logits.shape)}"
    logits = logits.float().cpu()
    best = int(logits.argmax())
    scaled = logits / sampling.temperature if sampling.temperature else logits
    if sampling.temperature == 0 or not scaled[best].isfinite():
        return torch.full_like(logits, -math.inf).index_fill_(0, torch.tensor(best), 0.0)
    if sampling.top_k:
        scaled = top_k_filter(scaled, sampling.top_k)
    if sampling.top_p:
        scaled = top_p_filter(scaled, sampling.top_p)
    return min_p_filter(scaled, sampling.min_p) if sampling.min_p else scaled


def draw(shaped: Tensor, generator: torch.Generator | None = None) -> int:
    """One id from the distribution with these logits (V,)."""
    return int(torch.multinomial(shaped.softmax(dim=-1), 1, generator=generator))


class Chooser:
    """Chooses the tokens of one text: bans, then the repetition penalty, then the draw; remembers what it has seen."""

    def __init__(
        self, sampling: Sampling, ids: Sequence[int], banned: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """ids: the prompt. banned: (V,) bool."""
        self._sampling, self._generator = sampling, generator
        self._banned = banned if bool(banned.any()) else None
        self._seen = torch.zeros_like(banned)
        self._seen[list(ids)] = True

    def choose(self, logits: Tensor, top_n: int = 0) -> tuple[int, list[tuple[int, float]]]:
        """The next id from raw logits (V,), and the top_n likeliest (id, log-probability) of what it was drawn from."""
        if self._banned is not None:
            logits = logits.masked_fill(self._banned, -math.inf)
        penalty = self._sampling.repetition_penalty
        if penalty is not None and penalty != 1:
            logits = penalize_repetition(logits, self._seen, penalty)
        if self._sampling.temperature == 0:
            token_id = int(logits.argmax())
            alternatives = [(token_id, 0.0)][:top_n]
        else:
            shaped = shape(logits, self._sampling)
            token_id = draw(shaped, self._generator)
            alternatives = likeliest(shaped.log_softmax(dim=-1), top_n) if top_n else []
        self._seen[token_id] = True
        return token_id, alternatives


def likeliest(logp: Tensor, n: int) -> list[tuple[int, float]]:
    """The n largest of log-probabilities (V,) as (id, log-probability), best first; impossible tokens are left out."""
    values, index = logp.topk(min(n, logp.shape[0]))
    pairs = zip(index.tolist(), values.tolist(), strict=True)
    return [(i, value) for i, value in pairs if value > -math.inf]
