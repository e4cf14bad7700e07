"""Seconds, memory and disk of sizes that were not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from niels_gpt.model.gpt import GPT
from niels_gpt.optim import build_optimizer
from niels_gpt.plan.cost import Costs, checkpoint_bytes, disk_bytes, moments_bytes, states_bytes
from niels_gpt.plan.recipe import Shape, Size, size_of, sized, tuned, with_steps
from niels_gpt.plan.running import disk_use
from niels_gpt.settings import model_config_of, validate_overrides
from tests.plan.samples import costs, measured, trial_peak


def test_speeds_go_through_what_was_measured_and_on_by_arithmetic() -> None:
    known = costs()
    for one in known.measured:
        assert known.seconds_per_token(Size(1, 1, one.flops)) == pytest.approx(one.seconds_per_token)
    seconds = [known.seconds_per_token(Size(1, 1, flops)) for flops in (1e5, 1e6, 5e6, 2e7, 1e8, 1e9)]
    assert seconds == sorted(seconds)
    largest = known.measured[-1]
    beyond = known.seconds_per_token(Size(1, 1, 10 * largest.flops))
    assert beyond == pytest.approx(10 * largest.seconds_per_token)
    between = known.seconds_per_token(Size(1, 1, measured(Shape(192, 4, 3, 576)).flops))
    assert between == pytest.approx(measured(Shape(192, 4, 3, 576)).seconds_per_token, rel=0.1)


def test_memory_of_other_sizes_and_batches() -> None:
    known = costs()
    for shape in (Shape(96, 2, 1, 288), Shape(512, 8, 8, 1536)):
        for batch in (0.25, 1.0):
            settings = validate_overrides(sized(tuned(), shape, batch=batch))
            assert known.peak_bytes(settings) == pytest.approx(trial_peak(settings), rel=0.02)


def test_few_bytes_an_activation_are_believed() -> None:
    """Our own kernels keep less than is counted: a base as large as in the trials, and a slope as small."""
    trials = [replace(one, peak_bytes=round(5e8 + one.states + 2.6 * one.activations)) for one in costs().measured]
    known = Costs(trials)
    assert (known.base, known.per_activation) == (pytest.approx(5e8, rel=0.01), pytest.approx(2.6, rel=0.01))


def test_checkpointing_and_smaller_microbatches_take_less() -> None:
    whole = sized(tuned(), Shape(256, 6, 4, 768))
    peaks = []
    for rows, checkpointing in ((16, False), (4, False), (4, True)):
        given = {**whole["training"]["pretrain"], "micro_B": rows, "activation_checkpointing": checkpointing}
        settings = validate_overrides({**whole, "training": {**whole["training"], "pretrain": given}})
        peaks.append(costs().peak_bytes(settings))
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.5 * peaks[2]


def test_one_measurement_is_enough_and_none_is_not() -> None:
    one = Costs([measured(Shape(128, 3, 2, 384))])
    assert one.seconds_per_token(Size(1, 1, 1e9)) > one.seconds_per_token(Size(1, 1, 1e7)) > 0
    assert one.peak_bytes(validate_overrides(tuned())) > 0
    with pytest.raises(ValueError, match="nothing was measured"):
        Costs([])


def test_states_are_those_of_the_real_optimizer() -> None:
    settings = validate_overrides(sized(tuned(), Shape(64, 2, 1, 192)))
    model = GPT(model_config_of(settings.model))
    optimizer = build_optimizer(model, settings.training.pretrain)
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    weights = sum(p.numel() * 4 for p in model.parameters())
    moments = sum(
        value.numel() * 4
        for part in optimizer.optimizers.values()  # type: ignore[union-attr]
        for state in part.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    assert moments_bytes(size_of(settings.model), settings.training.pretrain) == pytest.approx(moments, rel=0.01)
    assert states_bytes(settings) == pytest.approx(2 * weights + moments, rel=0.01)


def test_disk_holds_what_a_run_keeps() -> None:
    overrides = with_steps(sized(tuned(), Shape(128, 3, 2, 384)), 4e6)
    training = {**overrides["training"]}
    for phase in ("pretrain", "sft"):
        training[phase] = {**training[phase], "ckpt_every": 100, "keep_last": 3}
    settings = validate_overrides({**overrides, "training": training})
    few = disk_bytes(settings, {"pretrain": 50, "sft": 150}, 1e6)
    many = disk_bytes(settings, {"pretrain": 5000, "sft": 9000}, 1e6)
    kept = (many - few) / checkpoint_bytes(settings)
    assert 3 < kept < 3.6  # one and two files of the first, three of each phase of the second; the rest is logs


def test_files_of_several_names_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    (tmp_path / "d").write_bytes(bytes(10))
    assert disk_use([tmp_path, tmp_path / "missing"]) == 1010
