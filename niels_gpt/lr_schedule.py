"""Learning rate as a function of progress."""

from __future__ import annotations

import math


def lr_at_step(
    step: float,
    total_steps: float,
    *,
    base_lr: float,
    warmup_steps: float,
    min_lr: float,
    shape: str = "cosine",
    decay_fraction: float = 1.0,
) -> float:
    """Learning rate of 0-based `step`: linear warm-up to base_lr, then decay to min_lr at total_steps.

    cosine: half a cosine over everything after the warm-up. linear: constant, then a straight line over the last
    `decay_fraction` of all steps (trapezoid; Zhai et al. 2022, "Scaling Vision Transformers"). Steps may be fractions,
    so a time budget can stand in for a step count.
    """
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    if shape == "cosine":
        span = total_steps - warmup_steps
        progress = min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0
        lr = min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        start = max(warmup_steps, total_steps * (1 - decay_fraction))
        span = total_steps - start
        progress = min(1.0, max(0.0, (step - start) / span)) if span > 0 else float(step >= total_steps)
        lr = base_lr + (min_lr - base_lr) * progress
    return min(max(lr, min(min_lr, base_lr)), max(min_lr, base_lr))
