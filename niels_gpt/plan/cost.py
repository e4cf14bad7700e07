"""What a run takes: seconds per token and memory, carried from the sizes that were measured to others; and disk"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from niels_gpt.plan.recipe import Size, size_of
from niels_gpt.settings import PhaseSettings, Settings

FLOAT = 4  # bytes: weights, gradients and moments are float32
CHECKPOINT_BYTES = 95_000  # names, settings, tokenizer and counters
TOKENIZER_BYTES = 117_000  # its files, at the recipe's vocabulary
RUN_BYTES = 500_000  # charts and plans of both runs, and their settings beside every checkpoint
SFT_SPEED = 0.88  # on CPUs (docs/planning.md): half the rows a step, packed chats
LEAST_SLOPE = 1.0  # bytes an activation: our own kernels keep about half of what is counted, and a trial varies
STEP_BYTES = 410  # of metrics.jsonl for every step


@dataclass(frozen=True)
class Measured:
    """One probed size: what a trial of the real training step found."""

    name: str
    flops: float  # per token
    seconds_per_token: float
    peak_bytes: int
    states: float  # bytes that do not depend on the batch
    activations: float  # floats that do, by count


class Costs:
    """Seconds and memory of any size, from those of a few."""

    def __init__(self, measured: Sequence[Measured], sft_speed: float = SFT_SPEED) -> None:
        """sft_speed: tokens/s of fine-tuning over those of pretraining."""
        if not measured:
            raise ValueError("nothing was measured, so nothing can be planned")
        self.sft_speed = sft_speed
        self.measured = sorted(measured, key=lambda m: m.flops)
        self.base, self.per_activation = self._memory()

    def seconds_per_token(self, size: Size) -> float:
        """Between measured sizes along the line in logarithms; beyond them at the last one's FLOP/s, at least."""
        known = self.measured
        x = math.log(size.flops)
        xs, ys = [math.log(m.flops) for m in known], [math.log(m.seconds_per_token) for m in known]
        if x >= xs[-1]:
            return math.exp(ys[-1] + (x - xs[-1]))
        if x <= xs[0]:
            slope = 1.0 if len(xs) == 1 else min(1.0, max(0.0, (ys[1] - ys[0]) / (xs[1] - xs[0])))
            return math.exp(ys[0] + slope * (x - xs[0]))
        return math.exp(float(np.interp(x, xs, ys)))

    def peak_bytes(self, settings: Settings) -> float:
        """Memory at the highest while training with these settings."""
        return self.base + states_bytes(settings) + self.per_activation * activations(settings)

    def _memory(self) -> tuple[float, float]:
        """(bytes that every process takes, bytes per activation), by least squares; neither is negative."""
        rest = np.array([m.peak_bytes - m.states for m in self.measured])
        counts = np.array([m.activations for m in self.measured])
        if len(rest) > 1 and np.ptp(counts) > 0:
            weights = 1 / np.array([m.peak_bytes for m in self.measured])  # of relative errors
            rows = np.stack((np.ones_like(counts), counts), axis=1) * weights[:, None]
            base, slope = np.linalg.lstsq(rows, rest * weights, rcond=None)[0]
            if base >= 0 and slope >= LEAST_SLOPE:
                return float(base), float(slope)
        slope = float(2 * FLOAT)
        return max(0.0, float(np.max(rest - slope * counts))), slope


def states_bytes(settings: Settings) -> float:
    """Weights, gradients and the optimizer's moments."""
    size = size_of(settings.model)
    return FLOAT * size.parameters * 2 + moments_bytes(size, settings.training.pretrain)


def moments_bytes(size: Size, options: PhaseSettings) -> float:
    """Two of AdamW for every weight, one of Muon for those of matrices in blocks."""
    if options.optimizer == "adamw":
        return 2.0 * FLOAT * size.parameters
    return FLOAT * (2 * size.embedding + (size.parameters - size.embedding))


def activations(settings: Settings) -> float:
    """Floats that the backward pass of a microbatch needs, about."""
    model, options = settings.model, settings.training.pretrain
    positions = options.micro_B * model.T
    layer = 12 * model.C + 5 * model.d_ff + model.H * model.T / 2
    if options.activation_checkpointing:
        return positions * (model.L * model.C + layer + 2 * model.C)
    return positions * (model.L * layer + 2 * model.C)


def checkpoint_bytes(settings: Settings) -> float:
    """One checkpoint file: weights and moments."""
    size = size_of(settings.model)
    return FLOAT * size.parameters + moments_bytes(size, settings.training.pretrain) + CHECKPOINT_BYTES


def disk_bytes(settings: Settings, steps: dict[str, int], cache_bytes: float) -> float:
    """Caches, checkpoints that stay (latest and best are links to steps), logs."""
    files = 0
    for phase, n in steps.items():
        options: PhaseSettings = getattr(settings.training, phase)
        saves = n // options.ckpt_every + (n % options.ckpt_every != 0)
        files += min(options.keep_last, max(1, saves))
    logs = RUN_BYTES + STEP_BYTES * sum(steps.values())
    return cache_bytes + TOKENIZER_BYTES + files * checkpoint_bytes(settings) + logs
