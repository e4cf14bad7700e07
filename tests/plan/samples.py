"""A machine, a text and trials of it that need no measuring: what they say follows from the size alone."""

from __future__ import annotations

from niels_gpt.bench.trial import Result, Trial
from niels_gpt.plan.candidates import RUN_BYTES, Question
from niels_gpt.plan.cost import Costs, Measured, activations, states_bytes
from niels_gpt.plan.law import KNOWN_TEXT, Scale, shipped_law
from niels_gpt.plan.limits import Limits
from niels_gpt.plan.recipe import Shape, seeded, size_of, sized, tuned
from niels_gpt.plan.text import Source, Text
from niels_gpt.settings import Settings, validate_overrides

GB = 10**9
FLOPS = 8e10  # a second, of this machine
FIXED_S = 2e-5  # a token costs at least
BASE, PER_ACTIVATION = 4e8, 6.0  # memory of a trial: of any process, and per activation
TEXT = Text(
    pretrain=(Source("chitchat", 10_700_000, 1_430_000, 4000), Source("primer", 165_000, 4_100, 1300)),
    chats=(Source("primer", 130_000, 3_300, 1300, 3700),),
    bytes_per_token=3.7,
    tokenizer_s=5.0,
    caches_s=15.0,
    preparing_bytes=5e8,
)


def machine(memory: float = 16 * GB, disk: float = 100 * GB) -> Limits:
    return Limits("cpu", "a test", "fp32", int(memory), int(disk))


def question(hours: float, *, memory: float = 16 * GB, disk: float = 100 * GB, text: Text = TEXT) -> Question:
    overrides = seeded(tuned(), 42)
    settings = validate_overrides(overrides)
    scale = Scale(KNOWN_TEXT, 0.0)
    return Question(hours, settings, overrides, text, machine(memory, disk), shipped_law(), scale)


def measured(shape: Shape) -> Measured:
    """What the machine says of a size."""
    settings = validate_overrides(sized(tuned(), shape))
    flops = size_of(settings.model).flops
    return Measured(
        shape.name,
        flops,
        FIXED_S + flops / FLOPS,
        round(trial_peak(settings)),
        states_bytes(settings),
        activations(settings),
    )


def trial_peak(settings: Settings) -> float:
    return BASE + states_bytes(settings) + PER_ACTIVATION * activations(settings)


def true_peak(settings: Settings) -> float:
    """Of a run, which takes more than a trial of its step."""
    return trial_peak(settings) + RUN_BYTES


def costs() -> Costs:
    return Costs([measured(Shape(64, 2, 1, 192)), measured(Shape(128, 3, 2, 384)), measured(Shape(256, 6, 4, 768))])


def run(trial: Trial, timeout_s: float) -> Result:
    """A trial on the machine."""
    shape = Shape(trial.model.C, trial.model.L, trial.model.H, trial.model.d_ff)
    found = measured(shape)
    tokens = trial.micro_B * trial.model.T
    return Result(
        trial,
        "ok",
        ms_per_step=1000 * tokens * found.seconds_per_token,
        tokens_per_sec=1 / found.seconds_per_token,
        peak_bytes=found.peak_bytes,
        seconds=5.0,
    )
