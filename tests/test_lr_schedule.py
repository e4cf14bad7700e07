"""The learning rate as a function of progress."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.lr_schedule import lr_at_step
from niels_gpt.settings import PhaseSettings
from tests.reference import BUNDLE, needs_bundle

COSINE = {"base_lr": 1.0, "warmup_steps": 10, "min_lr": 0.1}


def test_warm_up_is_a_line_from_zero() -> None:
    assert [lr_at_step(s, 100, **COSINE) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_cosine_ends_at_min_lr_with_half_way_in_the_middle() -> None:
    assert lr_at_step(55, 100, **COSINE) == pytest.approx(0.55)
    assert lr_at_step(100, 100, **COSINE) == lr_at_step(1000, 100, **COSINE) == pytest.approx(0.1)


def test_linear_is_flat_then_straight() -> None:
    linear = {**COSINE, "shape": "linear", "decay_fraction": 0.5}
    assert lr_at_step(10, 100, **linear) == lr_at_step(50, 100, **linear) == 1.0
    assert lr_at_step(75, 100, **linear) == pytest.approx(0.55)
    assert lr_at_step(100, 100, **linear) == pytest.approx(0.1)


def test_a_run_that_is_all_warm_up() -> None:
    assert lr_at_step(10, 10, **COSINE) == 0.1 and lr_at_step(9, 10, **COSINE) == pytest.approx(0.9)


@given(
    step=st.floats(0, 300),
    total=st.floats(1, 200),
    warmup=st.floats(0, 200),
    shape=st.sampled_from(get_args(PhaseSettings.model_fields["lr_shape"].annotation)),
    decay=st.floats(0.01, 1),
)
def test_always_between_zero_and_the_peak(step: float, total: float, warmup: float, shape: str, decay: float) -> None:
    lr = lr_at_step(
        step, total, base_lr=1.0, warmup_steps=min(warmup, total), min_lr=0.1, shape=shape, decay_fraction=decay
    )
    assert 0 <= lr <= 1
    if step >= warmup:
        assert lr >= 0.1


@needs_bundle
def test_published_schedule() -> None:
    recorded = json.loads((BUNDLE / "v2/lr_schedule.json").read_text())
    options = {key: recorded[key] for key in ("base_lr", "warmup_steps", "min_lr")}
    ours = [lr_at_step(s, recorded["total_steps"], **options) for s in range(len(recorded["lr"]))]
    assert ours == pytest.approx(recorded["lr"], rel=1e-12)
