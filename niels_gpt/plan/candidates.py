"""Every model a plan could train in the time there is, with what it would cost and reach; ranked by quality"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from niels_gpt.plan.cost import Costs, disk_bytes
from niels_gpt.plan.law import Law, Prediction, Scale
from niels_gpt.plan.limits import Limits
from niels_gpt.plan.recipe import SFT_SHARE, SHARES, Shape, Size, size_of, sized
from niels_gpt.plan.text import Text
from niels_gpt.settings import PHASES, PhaseSettings, Settings, validate_overrides
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.start import eval_shape

RUN_BYTES = 1.5e8  # that a run takes beside steps: mapped caches, tokenizer, evaluation, logs
START_S = 8.0  # starting the program and loading its libraries
PHASE_S = 2.5  # of a phase's time that no step gets: opening caches, warming up, saving
EVALUATIONS = 2  # of a phase, one on the way and one at its end
SPEED_ERROR = 0.15  # so much slower or faster a machine may turn out than a minute's measuring says
EVALUATION_SHARE = 0.05  # of the time at most
EVALUATED = 0.4  # time of an evaluated token over that of a trained one
SAVE_S = 600.0  # between scheduled saves of a long phase
SAVES = 1.5  # scheduled saves of a phase; the half keeps a slower or faster machine from making one more or less
SHORTEST = 2.0**-12  # share of the time that a run must take
SEARCH_ROUNDS = 60  # of a golden section: to the last token
GOLDEN = (5**0.5 - 1) / 2
LEAST_TRAINING_S = 20.0


@dataclass(frozen=True)
class Candidate:
    """One model and its run."""

    shape: Shape
    size: Size
    micro_B: int
    accum_steps: int
    sft_micro_B: int
    sft_accum_steps: int
    checkpointing: bool
    base_lr: float
    muon_lr: float
    tokens: float  # of both phases
    epochs: float  # how often the text is read
    steps: Mapping[str, int]  # of each phase, expected
    tokens_per_s: float
    measured: bool  # whether this very size was probed
    prediction: Prediction
    peak_bytes: float
    disk_bytes: float
    seconds: Mapping[str, float]  # tokenizer, caches, pretrain, sft, evaluation, start
    evaluated_windows: int | None  # None: all of the validation text
    overrides: Mapping[str, Any]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        return {"name": self.shape.name, **values, "total_seconds": self.total_seconds}


@dataclass(frozen=True)
class Question:
    """What is to be planned."""

    hours: float
    settings: Settings  # the recipe on the sources asked for
    overrides: Mapping[str, Any]
    text: Text
    machine: Limits
    law: Law
    scale: Scale


def shapes(settings: Settings) -> list[Shape]:
    """The sizes to choose from, the MLP as wide as the recipe has it."""
    ratio = settings.model.d_ff / settings.model.C
    return [Shape(dims.C, dims.L, dims.H, round(ratio * dims.C)) for dims in settings.plan.sizes]


def candidates(question: Question, costs: Costs) -> list[Candidate]:
    """The best run of every size that fits, best first; ValueError if none does."""
    found = [one for shape in shapes(question.settings) if (one := candidate_of(question, costs, shape)) is not None]
    if not found:
        machine = question.machine
        raise ValueError(
            f"no model fits: a run may take {machine.memory_bytes / 1e9:.2f} GB of memory and"
            f" {machine.disk_bytes / 1e9:.2f} GB of disk here; free some"
        )
    return sorted(found, key=lambda c: (c.prediction.bpb, c.size.parameters))


def candidate_of(question: Question, costs: Costs, shape: Shape) -> Candidate | None:
    """One size with all the time there is, or less if that is predicted to end better; None if too large.

    ValueError if the time is over before training begins.
    """
    cut = _that_fits(question, costs, shape)
    if cut is None:
        return None
    overrides, settings = cut
    size, text = size_of(settings.model), question.text
    pace = _Pace(settings, 1 / costs.seconds_per_token(size), costs.sft_speed)
    val_tokens = text.val_tokens(settings.data.val_pretrain_source)
    evaluation = min(pace.evaluation_s(val_tokens), EVALUATION_SHARE * (3600 * question.hours))
    training = _training_s(question, evaluation)
    most = sum(pace.tokens({phase: training * share for phase, share in SHARES.items()}).values())
    tokens = best_tokens(question.law, size, most, unique=text.unique_tokens)
    seconds = {phase: training * share * tokens / most for phase, share in SHARES.items()}
    steps = {phase: max(1, round(n / step_tokens(settings, phase))) for phase, n in pace.tokens(seconds).items()}
    overrides = _scheduled(overrides, steps, seconds)
    settings = validate_overrides(overrides)
    disk = disk_bytes(settings, steps, text.cache_bytes)
    if disk > question.machine.disk_bytes:
        return None
    read = tokens * (1 - SFT_SHARE * (1 - settings.data.replay_pretrain))
    before = {"start": START_S, "tokenizer": text.tokenizer_s, "caches": text.caches_s}
    pretrain, sft = settings.training.pretrain, settings.training.sft
    return Candidate(
        shape=shape,
        size=size,
        micro_B=pretrain.micro_B,
        accum_steps=pretrain.accum_steps,
        sft_micro_B=sft.micro_B,
        sft_accum_steps=sft.accum_steps,
        checkpointing=pretrain.activation_checkpointing,
        base_lr=pretrain.base_lr,
        muon_lr=pretrain.muon_lr,
        tokens=tokens,
        epochs=read / text.unique_tokens,
        steps=steps,
        tokens_per_s=pace.rate,
        measured=any(m.name == shape.name for m in costs.measured),
        prediction=_prediction(question, size, tokens),
        peak_bytes=peak_bytes(question, costs, settings),
        disk_bytes=disk,
        seconds={**before, **seconds, "evaluation": evaluation},
        evaluated_windows=pace.windows(evaluation, val_tokens),
        overrides=overrides,
    )


class _Pace:
    """What one model does in a time: tokens trained, text evaluated."""

    def __init__(self, settings: Settings, rate: float, sft_speed: float) -> None:
        """rate: tokens/s of pretraining's steps, of which fine-tuning's are `sft_speed`."""
        self.rate, self._T = rate, settings.model.T
        self._speeds = {"pretrain": rate, "sft": rate * sft_speed}
        self._lost = {p: PHASE_S + EVALUATIONS * self.evaluation_s(_evaluated_tokens(settings, p)) for p in PHASES}

    def evaluation_s(self, tokens: float) -> float:
        """Seconds that evaluating these tokens takes."""
        return tokens * EVALUATED / self.rate

    def windows(self, seconds: float, tokens: float) -> int | None:
        """How many windows of a validation text of `tokens` are evaluated in a time; None: all of them."""
        windows = int(seconds * self.rate / EVALUATED / self._T)
        return None if windows * self._T >= 0.98 * tokens else max(1, windows)

    def tokens(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """How many tokens each phase trains on in its seconds."""
        return {p: self._speeds[p] * max(1.0, seconds[p] - self._lost[p]) for p in PHASES}


def _training_s(question: Question, evaluation_s: float) -> float:
    """What evaluation at the end and everything before training leave of the hours; ValueError if too little."""
    text = question.text
    left = 3600 * question.hours - text.tokenizer_s - text.caches_s - evaluation_s - START_S
    if left < LEAST_TRAINING_S:
        raise ValueError(
            f"{question.hours:g} hours leave no time for training: tokenizer and caches alone take"
            f" {text.tokenizer_s + text.caches_s:.0f} s; ask for more hours or give less text"
        )
    return left


def peak_bytes(question: Question, costs: Costs, settings: Settings) -> float:
    """Memory at the highest: on a CPU of the whole process, which makes tokenizer and caches before it trains."""
    training = costs.peak_bytes(settings)
    return max(training + RUN_BYTES, question.text.preparing_bytes) if question.machine.device == "cpu" else training


def _prediction(question: Question, size: Size, tokens: float) -> Prediction:
    """With the band of the curve, at the fewest and the most tokens that the time may come to."""
    said, fewest, most = (
        question.law.predict(size, tokens * factor, unique=question.text.unique_tokens, scale=question.scale)
        for factor in (1.0, 1 - SPEED_ERROR, 1 + SPEED_ERROR)
    )
    return Prediction(said.bpb, min(said.low, fewest.low, most.low), max(said.high, fewest.high, most.high))


def best_tokens(law: Law, size: Size, most: float, *, unique: float) -> float:
    """How many tokens of at most `most` are predicted to end best: all of them, until reading again does harm."""

    def bits(log_tokens: float) -> float:
        return law.curve(size, math.exp(log_tokens), unique=unique)

    low, high = math.log(most * SHORTEST), math.log(most)
    if bits(high) <= bits(high - 1e-3):
        return most
    for _ in range(SEARCH_ROUNDS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if bits(left) <= bits(right) else (left, high)
    return math.exp((low + high) / 2)


def _evaluated_tokens(settings: Settings, phase: str) -> int:
    """Positions of one evaluation on the way: every source's windows, or those of text and chats."""
    batches, rows = eval_shape(getattr(settings.training, phase))
    sources = len(settings.data.mix_pretrain) if phase == "pretrain" else 2
    return sources * batches * rows * settings.model.T


def step_tokens(settings: Settings, phase: str) -> int:
    """Positions of one optimizer step."""
    options: PhaseSettings = getattr(settings.training, phase)
    return options.rows * settings.model.T


def _that_fits(question: Question, costs: Costs, shape: Shape) -> tuple[dict[str, Any], Settings] | None:
    """The recipe's batch in the largest microbatches that fit, with all activations kept if possible."""
    whole = sized(question.overrides, shape)
    most = max(whole["training"][phase]["micro_B"] for phase in PHASES)
    for checkpointing in (False, True):
        limit = most
        while limit:
            phases = {p: _cut(whole["training"][p], limit, checkpointing) for p in PHASES}
            overrides = {**whole, "training": {**whole["training"], **phases}}
            settings = validate_overrides(overrides)
            if peak_bytes(question, costs, settings) <= question.machine.memory_bytes:
                return overrides, settings
            limit //= 2
    return None


def _cut(options: Mapping[str, Any], limit: int, checkpointing: bool) -> dict[str, Any]:
    """A phase's options with the same batch in microbatches of at most `limit` rows."""
    given = Microbatches(options["micro_B"], options.get("accum_steps", 1))
    cut = given.smaller(min(limit, given.size))
    assert cut is not None  # one row divides everything
    return {**options, "micro_B": cut.size, "accum_steps": cut.count, "activation_checkpointing": checkpointing}


def _scheduled(overrides: Mapping[str, Any], steps: Mapping[str, int], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The recipe on this time budget: its schedule runs on the clock, its warm-up and saves by these steps."""
    tuned = validate_overrides(overrides).training
    training = {**overrides["training"], "sft_share": SFT_SHARE}
    for phase, n in steps.items():
        options: PhaseSettings = getattr(tuned, phase)
        every = max(1, round(n / max(SAVES, seconds[phase] / SAVE_S + 0.5)))
        training[phase] = {
            **training[phase],
            "minutes": seconds[phase] / 60,
            "total_steps": n,
            "warmup_steps": round(n * options.warmup_steps / options.total_steps),
            "ckpt_every": every,
            "eval_every": every,
            "log_every": max(1, min(options.log_every, n // 10)),
        }
    return {**overrides, "training": training}
