"""The quickstart's recipe at any size: settings of a model of another shape, batch, dropout or number of tokens

What was tuned at one width is carried to another: AdamW's rate, which is that of the embedding and the norms, falls
with the width (the logits' change per step is proportional to both); Muon's steps are of one size in every direction
and stay.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from niels_gpt import paths
from niels_gpt.config import ModelConfig
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import DATA_SEEDS, PHASES, ModelSettings, load_overrides, model_config_of, validate_overrides
from niels_gpt.train.mfu import training_flops

CONFIG = "configs/quickstart.json"
SFT_SHARE = 0.6  # of the training budget; tuned in docs/log.md
SHARES = {"pretrain": 1 - SFT_SHARE, "sft": SFT_SHARE}


@dataclass(frozen=True)
class Shape:
    """What makes a model large or small; the rest of it is the recipe's."""

    width: int  # C
    layers: int  # L
    heads: int  # H
    mlp: int  # d_ff

    def settings(self) -> dict[str, int]:
        """As overrides of `model`."""
        return {"C": self.width, "L": self.layers, "H": self.heads, "d_ff": self.mlp}

    @property
    def name(self) -> str:
        return f"{self.width}x{self.layers}"


@dataclass(frozen=True)
class Size:
    """Parameters and arithmetic of a model."""

    parameters: int  # all distinct ones
    embedding: int  # those of the embedding, which is the head as well
    flops: float  # of training on one token


def tuned() -> dict[str, Any]:
    """The recipe as it was tuned: the overrides of the quickstart."""
    return load_overrides(paths.shipped(CONFIG))


def size_of(model: ModelSettings) -> Size:
    """Counted on a model without storage."""
    return _size(model_config_of(model))


@functools.cache
def _size(config: ModelConfig) -> Size:
    with torch.device("meta"):
        model = GPT(config)
    return Size(model.num_parameters, model.tok_emb.weight.numel(), training_flops(model))


def sized(
    recipe: Mapping[str, Any],
    shape: Shape,
    *,
    dropout: float | None = None,
    batch: float = 1.0,
    sft_batch: float = 1.0,
    adam: float = 1.0,
    muon: float = 1.0,
) -> dict[str, Any]:
    """A recipe (`tuned`, perhaps on other sources) for another shape, as overrides.

    dropout: None for the recipe's. batch, sft_batch: factors on the rows of a step, of both phases and of fine-tuning
    alone. adam, muon: factors on the learning rates that the recipe would choose.
    """
    factor = adam * min(1.0, recipe["model"]["C"] / shape.width)
    training = {**recipe["training"]}
    for phase in PHASES:
        given = training[phase] = {**training[phase]}
        for rate in ("base_lr", "min_lr"):
            given[rate] = _rounded(given[rate] * factor)
        given["muon_lr"] = _rounded(given["muon_lr"] * muon)
        given["micro_B"] = max(1, round(given["micro_B"] * batch * (sft_batch if phase == "sft" else 1.0)))
    model = {**recipe["model"], **shape.settings()}
    if dropout is not None:
        model["dropout"] = dropout
    return {**recipe, "model": model, "training": training}


def with_steps(overrides: Mapping[str, Any], tokens: float) -> dict[str, Any]:
    """The recipe with a number of tokens instead of a time budget; each phase ends its schedule after its share."""
    settings = validate_overrides(overrides)
    training = {**overrides["training"]}
    for phase, share in SHARES.items():
        options = getattr(settings.training, phase)
        steps = max(1, round(tokens * share / (options.rows * settings.model.T)))
        warmup = round(steps * options.warmup_steps / options.total_steps)
        training[phase] = {**training[phase], "minutes": None, "total_steps": steps, "warmup_steps": warmup}
    return {**overrides, "training": training}


def with_minutes(overrides: Mapping[str, Any], minutes: float) -> dict[str, Any]:
    """The recipe on a time budget, of which fine-tuning has its share."""
    training = {**overrides["training"]}
    for phase, share in SHARES.items():
        training[phase] = {**training[phase], "minutes": minutes * share}
    return {**overrides, "training": training}


def seeded(overrides: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Everything random by this seed: weights, order of the text, and what is kept for validation."""
    training = {**overrides["training"]}
    for phase in PHASES:
        training[phase] = {**training[phase], "seed": seed}
    data = {**overrides["data"]}
    for section, key in DATA_SEEDS:
        data[section] = {**data.get(section, {}), key: seed}
    return {**overrides, "training": training, "data": data}


def _rounded(rate: float) -> float:
    """Four digits: a settings file is read by people."""
    return float(f"{rate:.4g}")
