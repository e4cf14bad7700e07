"""A minute of measuring: the real training step at a few sizes around the one that looks best

Sizes are chosen as results come in: the recipe's own first, then whichever the curve ranks first at the speeds known so
far, then its neighbours. What is not measured is carried over by its arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from niels_gpt.bench.trial import Result, Trial, run_trial
from niels_gpt.plan.cost import SFT_SPEED, Costs, Measured, activations, states_bytes
from niels_gpt.plan.recipe import Shape, size_of, sized
from niels_gpt.settings import Settings, validate_overrides

WARMUP, STEPS, SLOW_STEPS = 1, 5, 2  # of a trial; the last where a step is slow
SLOW_S = 1.5
PATIENCE_S = 60.0  # with the first trial: a plan from a slow one is better than none
START_S = 6.0  # of a trial's process, until one has been seen
MOST_TRIALS = 5
Runner = Callable[[Trial, float], Result]
Say = Callable[[str], None]


def measure(
    recipe: Mapping[str, Any],
    shapes: Sequence[Shape],
    *,
    device: str,
    seconds: float,
    rank: Callable[[Costs], Sequence[Shape]],
    say: Say,
    run: Runner = run_trial,
) -> Costs:
    """Speeds and memory of some of the sizes, in at most so many seconds after the first of them.

    rank: the sizes in the order of their promise, at what is known. Raises RuntimeError if not one trial succeeds.
    """
    stop = time.monotonic() + seconds
    tuned = validate_overrides(recipe).model
    first = next((s for s in shapes if (s.width, s.layers) == (tuned.C, tuned.L)), shapes[0])
    measured: list[Measured] = []
    tried: list[Shape] = []
    start_s, shape, last = START_S, first, ""
    while len(tried) < MOST_TRIALS:
        settings = _settings(recipe, shape)
        step_s = _expected_step(measured, settings)
        steps = STEPS if step_s < SLOW_S else SLOW_STEPS
        needed = start_s + (WARMUP + steps) * step_s
        left = stop - time.monotonic() - (0.0 if device == "cpu" else start_s)  # for the step of fine-tuning
        if measured and needed > left:
            break
        say(f"measuring {shape.name} ({len(tried) + 1})")
        trial = replace(Trial.of(settings, device=device), steps_warmup=WARMUP, steps_measure=steps)
        result = run(trial, left if measured else PATIENCE_S)
        tried.append(shape)
        if result.ok:
            measured.append(_measured(shape, settings, result))
            start_s = max(1.0, result.seconds - (WARMUP + steps) * (result.ms_per_step or 0.0) / 1000)
        else:
            last = result.message
        following = _next(shapes, tried, measured, rank)
        if following is None:
            break
        shape = following
    if not measured:
        raise RuntimeError(f"no training step could be measured on this machine: {last}")
    if device == "cpu":
        return Costs(measured)
    say("measuring the step of fine-tuning")
    return Costs(measured, _sft_speed(recipe, tried, measured, device, run))


def _sft_speed(
    recipe: Mapping[str, Any], tried: Sequence[Shape], measured: Sequence[Measured], device: str, run: Runner
) -> float:
    """Tokens/s with the rows of fine-tuning over those of pretraining: a GPU hardly minds how many rows a step has."""
    known = {one.name: one for one in measured}
    shape = next(shape for shape in reversed(tried) if shape.name in known)
    settings = _settings(recipe, shape)
    trial = Trial.of(settings, device=device, micro_B=settings.training.sft.micro_B)
    result = run(replace(trial, steps_warmup=WARMUP, steps_measure=STEPS), PATIENCE_S)
    if not result.ok or not result.tokens_per_sec:
        return SFT_SPEED
    return min(1.0, result.tokens_per_sec * known[shape.name].seconds_per_token)


def _settings(recipe: Mapping[str, Any], shape: Shape) -> Settings:
    return validate_overrides(sized(recipe, shape))


def _measured(shape: Shape, settings: Settings, result: Result) -> Measured:
    assert result.tokens_per_sec and result.peak_bytes is not None
    return Measured(
        shape.name,
        size_of(settings.model).flops,
        1 / result.tokens_per_sec,
        result.peak_bytes,
        states_bytes(settings),
        activations(settings),
    )


def _expected_step(measured: Sequence[Measured], settings: Settings) -> float:
    if not measured:
        return 0.5
    tokens = settings.training.pretrain.rows * settings.model.T
    return tokens * Costs(measured).seconds_per_token(size_of(settings.model))


def _next(
    shapes: Sequence[Shape],
    tried: Sequence[Shape],
    measured: Sequence[Measured],
    rank: Callable[[Costs], Sequence[Shape]],
) -> Shape | None:
    """The most promising size that was not tried; as long as none has worked, the smallest."""
    order = rank(Costs(measured)) if measured else shapes
    return next((shape for shape in order if shape not in tried), None)
