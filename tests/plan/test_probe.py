"""Which sizes are measured, for how long, and what becomes of trials that fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from niels_gpt.bench.trial import Result, Trial, run_trial
from niels_gpt.plan import probe
from niels_gpt.plan.candidates import candidates, shapes
from niels_gpt.plan.cost import SFT_SPEED, Costs
from niels_gpt.plan.recipe import Shape, tuned
from niels_gpt.settings import validate_overrides
from tests.plan.samples import costs, question, run


class Runner:
    """Remembers the trials it was asked for; `failing` names widths that end otherwise."""

    def __init__(self, failing: dict[int, str] | None = None) -> None:
        self.failing, self.trials, self.patience = failing or {}, list[Trial](), list[float]()

    def __call__(self, trial: Trial, timeout_s: float) -> Result:
        self.trials.append(trial)
        self.patience.append(timeout_s)
        status = self.failing.get(trial.model.C)
        return run(trial, timeout_s) if status is None else Result(trial, status, message="it failed")  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        return [f"{trial.model.C}x{trial.model.L}" for trial in self.trials]


def measure(runner: Runner, hours: float, seconds: float = 60.0) -> Costs:
    asked = question(hours)
    return probe.measure(
        asked.overrides,
        shapes(asked.settings),
        device="cpu",
        seconds=seconds,
        rank=lambda known: [candidate.shape for candidate in candidates(asked, known)],
        say=lambda text: None,
        run=runner,
    )


def test_the_recipes_size_comes_first_then_those_that_look_best() -> None:
    runner = Runner()
    found = measure(runner, 0.5)
    assert runner.names[0] == "128x3" and len(set(runner.names)) == len(runner.names) >= 3
    best = candidates(question(0.5), found)[0]
    assert best.measured and best.shape == candidates(question(0.5), costs())[0].shape
    for trial in runner.trials:  # the step that will be trained
        assert trial.micro_B == 16 and trial.device == "cpu" and trial.model.dropout == 0.0
        assert trial.settings["training"]["pretrain"]["optimizer"] == "muon"


def test_little_time_means_one_trial_and_none_is_waited_for_longer() -> None:
    runner = Runner()
    measure(runner, 0.5, seconds=0.0)
    assert len(runner.trials) == 1
    runner = Runner()
    measure(runner, 0.5, seconds=30.0)
    assert len(runner.trials) > 1 and max(runner.patience[1:]) <= 30.0


def test_a_trial_that_fails_is_left_out() -> None:
    runner = Runner({128: "timeout"})
    found = measure(runner, 0.5)
    assert runner.names[:2] == ["128x3", "64x2"] and "128x3" not in {m.name for m in found.measured}
    assert runner.patience[0] == runner.patience[1] == probe.PATIENCE_S
    with pytest.raises(RuntimeError, match=r"no training step could be measured.*it failed"):
        measure(Runner({dims.C: "oom" for dims in question(1.0).settings.plan.sizes}), 0.5)


def test_a_gpu_is_asked_for_the_speed_of_fine_tuning() -> None:
    asked, runner = question(0.5), Runner()
    found = probe.measure(
        asked.overrides,
        [Shape(128, 3, 2, 384)],
        device="cuda",
        seconds=60.0,
        rank=lambda known: [],
        say=lambda text: None,
        run=lambda trial, patience: replace(runner(trial, patience), tokens_per_sec=1000.0 * trial.micro_B),
    )
    assert [trial.micro_B for trial in runner.trials] == [16, 8] and found.sft_speed == pytest.approx(0.5)
    assert measure(Runner(), 0.5).sft_speed == SFT_SPEED


def test_a_real_trial_can_be_planned_with() -> None:
    recipe = {**tuned(), "model": {**tuned()["model"], "V": 512, "T": 32}}
    recipe["tokenizer"] = {**recipe["tokenizer"], "vocab_size": 512}
    shape = Shape(32, 1, 1, 96)
    settings = probe._settings(recipe, shape)
    trial = replace(Trial.of(settings, device="cpu"), steps_warmup=1, steps_measure=1)
    result = run_trial(trial, 120)
    assert result.ok, result.message
    found = probe._measured(shape, settings, result)
    assert found.peak_bytes > found.states > 0 and 0 < found.seconds_per_token < 1
    assert Costs([found]).peak_bytes(validate_overrides(recipe)) > found.states
