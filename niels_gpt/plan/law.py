"""What a model of N parameters reaches on D tokens: bits per byte, with a band, before anybody has waited

    L = E + A / N^a + B n^c / D'^b + overfitting    (Hoffmann et al. 2022, but for c; n = N / 10^6)
    D' = U + U R (1 - exp(-(D/U - 1) / R))          (text of U tokens read again: Muennighoff et al. 2023)

N counts the embedding by a fitted share of it. Coefficients are those of `law.json`, which `tools/fit_law.py` fits to
the runs in `docs/law/*.jsonl`; docs/planning.md has the fit and its error.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt.plan.recipe import Size

FILE = Path(__file__).with_name("law.json")
KNOWN_TEXT = 1.0  # factor of the source that the curve is fitted to


@dataclass(frozen=True)
class Prediction:
    """Validation bits per byte: what is expected, and between what it should lie."""

    bpb: float
    low: float
    high: float

    @property
    def band(self) -> float:
        """Half of the band's width, as a share of the middle."""
        return (self.high - self.low) / (2 * self.bpb)


@dataclass(frozen=True)
class Law:
    """A fitted curve. `error`: standard deviation of the logarithm, from runs that the fit had not seen."""

    E: float
    A: float
    a: float
    B: float
    b: float
    c: float  # large models learn more slowly at first
    embedding: float  # share of the embedding's parameters that counts
    repeats: float  # R: so many epochs more are worth as much as reading fresh text
    excess: float  # overfitting: bits per byte that a model of ten million parameters loses in five epochs
    excess_size: float  # powers by which that grows with parameters
    excess_epochs: float  # and with epochs beyond the first
    error: float
    beyond: float  # further error for every doubling of tokens or parameters beyond what was fitted
    parameters: tuple[float, float]  # N of the fitted runs, lowest and highest
    tokens: tuple[float, float]
    epochs: float  # the most of the fitted runs
    sources: Mapping[str, float]  # bits per byte of other text over those of the first, at equal N and D

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Law:
        """From JSON values; ValueError names what is missing."""
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(f"the curve lacks {', '.join(missing)}; run tools/fit_law.py again")
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "parameters": tuple(known["parameters"]), "tokens": tuple(known["tokens"])})

    def counted(self, size: Size) -> float:
        """N."""
        return size.parameters - (1 - self.embedding) * size.embedding

    def curve(self, size: Size, tokens: float, *, unique: float) -> float:
        """Bits per byte of the text it was fitted to."""
        N = self.counted(size)
        fresh = effective_tokens(tokens, unique, self.repeats)
        learnt = self.E + self.A / N**self.a + self.B * (N / 1e6) ** self.c / fresh**self.b
        return learnt + self.overfitting(N, tokens / unique)

    def overfitting(self, N: float, epochs: float) -> float:
        """What reading the same text again costs a model that can learn it by heart."""
        if epochs <= 1:
            return 0.0
        grown = (N / 1e7) ** self.excess_size * ((epochs - 1) / 4) ** self.excess_epochs
        return float(self.excess * grown)

    def predict(self, size: Size, tokens: float, *, unique: float, scale: Scale | None = None) -> Prediction:
        """Final validation bits per byte of the recipe on `tokens` tokens, of which `unique` are different."""
        scale = scale or Scale(KNOWN_TEXT, 0.0)
        middle = scale.factor * self.curve(size, tokens, unique=unique)
        error = self.error + self.beyond * self._doublings_beyond(size, tokens, unique) + scale.error
        return Prediction(middle, middle * math.exp(-2 * error), middle * math.exp(2 * error))

    def _doublings_beyond(self, size: Size, tokens: float, unique: float) -> float:
        N, (low_N, high_N), (low_D, high_D) = self.counted(size), self.parameters, self.tokens
        far = [low_N / N, N / high_N, low_D / tokens, tokens / high_D, tokens / unique / self.epochs]
        return sum(max(0.0, math.log2(ratio)) for ratio in far)

    def scale_of(self, source: str) -> Scale | None:
        """How other text compares, if it was fitted."""
        factor = self.sources.get(source)
        return None if factor is None else Scale(factor, 0.0)


@dataclass(frozen=True)
class Scale:
    """Bits per byte of a text over those of the text that the curve was fitted to, and how sure that is."""

    factor: float
    error: float  # standard deviation of its logarithm


def effective_tokens(tokens: float, unique: float, repeats: float) -> float:
    """How many tokens of fresh text are worth as much as `tokens` of a text that has `unique`."""
    if tokens <= unique:
        return tokens
    return unique * (1 + repeats * (1 - math.exp(-(tokens / unique - 1) / repeats)))


@functools.cache
def shipped_law() -> Law:
    """The curve that comes with the project."""
    return Law.from_dict(json.loads(FILE.read_text(encoding="utf-8"))["law"])
