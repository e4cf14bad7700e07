"""What a plan chooses: the best that fits, in the time there is, and never worse with more of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from niels_gpt.plan.candidates import _cut, best_tokens, candidates
from niels_gpt.plan.law import shipped_law
from niels_gpt.plan.recipe import Size
from niels_gpt.settings import validate_overrides
from tests.plan.samples import GB, TEXT, costs, question, true_peak


@pytest.mark.parametrize("hours", [0.05, 0.1, 0.5, 8.0, 100.0])
def test_the_best_is_first_and_its_time_is_that_asked_for(hours: float) -> None:
    ranked = candidates(question(hours), costs())
    bits = [candidate.prediction.bpb for candidate in ranked]
    assert bits == sorted(bits) and len(ranked) > 3
    for one in ranked:
        assert one.total_seconds <= 3600 * hours * 1.001
        settings = validate_overrides(one.overrides)
        minutes = settings.training.pretrain.minutes, settings.training.sft.minutes
        assert minutes == (one.seconds["pretrain"] / 60, one.seconds["sft"] / 60)
        assert one.shape.width == settings.model.C
        for phase in (settings.training.pretrain, settings.training.sft):
            assert phase.warmup_steps <= phase.total_steps and phase.min_lr <= phase.base_lr
    if hours < 1:
        assert ranked[0].total_seconds == pytest.approx(3600 * hours, rel=0.001)


def test_more_time_is_never_predicted_to_be_worse() -> None:
    hours = [0.05, 0.06, 0.08, 0.1, 0.2, 0.3, 0.5, 1, 2, 4, 8, 16, 30, 50, 100]
    best = [candidates(question(h), costs())[0].prediction.bpb for h in hours]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(best))
    assert best[3] < best[0] - 0.01  # and at first it is better


def test_larger_models_are_chosen_for_longer() -> None:
    sizes = [candidates(question(h), costs())[0].size.parameters for h in (0.05, 0.5, 4.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_nothing_that_needs_more_memory_than_there_is() -> None:
    for memory in (4 * GB, 1 * GB):
        asked = question(20.0, memory=memory)
        found = candidates(asked, costs())
        assert found and all(one.peak_bytes <= memory for one in found)
        for one in found:  # the prediction is that of the machine
            assert true_peak(validate_overrides(one.overrides)) <= 1.02 * memory
    cut = next(one for one in found if one.accum_steps > 1)
    assert cut.micro_B * cut.accum_steps == 16  # the same batch in smaller microbatches
    assert len(found) < len(candidates(question(20.0), costs()))


def test_text_may_take_more_memory_than_training() -> None:
    large = replace(TEXT, preparing_bytes=3e9)
    found = candidates(question(1.0, text=large), costs())
    assert min(one.peak_bytes for one in found) == 3e9
    with pytest.raises(ValueError, match="no model fits"):
        candidates(question(1.0, memory=2 * GB, text=large), costs())


def test_a_batch_is_cut_and_never_changed() -> None:
    recipe = {"micro_B": 24, "accum_steps": 2}
    for limit in (32, 24, 16, 12, 5, 1):
        cut = _cut(recipe, limit, False)
        assert cut["micro_B"] <= limit and cut["micro_B"] * cut["accum_steps"] == 48


def test_nothing_that_does_not_fit_on_the_disk() -> None:
    found = candidates(question(1.0, disk=1.5e8), costs())
    assert found and all(one.disk_bytes <= 1.5e8 for one in found)
    assert len(found) < len(candidates(question(1.0), costs()))
    with pytest.raises(ValueError, match=r"no model fits.*0\.01 GB of disk"):
        candidates(question(1.0, disk=1e7), costs())


def test_text_that_takes_all_the_time_is_said() -> None:
    slow = replace(TEXT, caches_s=400.0)
    with pytest.raises(ValueError, match="leave no time for training: tokenizer and caches alone take 405 s"):
        candidates(question(0.1, text=slow), costs())


def test_a_run_stops_where_reading_again_does_harm() -> None:
    law, large = shipped_law(), Size(6_000_000, 1_000_000, 0.0)
    stop = best_tokens(law, large, 1e9, unique=3e6)

    def bits(tokens: float) -> float:
        return law.curve(large, tokens, unique=3e6)

    assert stop < 1e8 and bits(stop) <= min(bits(0.9 * stop), bits(1.1 * stop), bits(1e9))
    assert best_tokens(law, large, 1e6, unique=3e6) == 1e6


def test_the_band_holds_a_slower_and_a_faster_machine() -> None:
    asked = question(0.5)
    one = candidates(asked, costs())[0]
    for factor in (0.86, 1.14):
        tokens = factor * one.tokens
        said = asked.law.predict(one.size, tokens, unique=TEXT.unique_tokens)
        assert one.prediction.low < said.low and said.high < one.prediction.high
    assert one.prediction.band <= 0.05


def test_epochs_are_those_of_the_text() -> None:
    one = candidates(question(0.5), costs())[0]
    text_share = 0.4 + 0.6 * 0.75  # pretraining, and the replayed part of fine-tuning
    assert one.epochs == pytest.approx(text_share * one.tokens / TEXT.unique_tokens)
    tokens = one.steps["pretrain"] * 16 * 256 + one.steps["sft"] * 8 * 256
    assert tokens == pytest.approx(one.tokens, rel=0.01)


def test_a_short_evaluation_is_spread_over_the_text() -> None:
    short, long = (candidates(question(h), costs())[0] for h in (0.05, 5.0))
    assert short.seconds["evaluation"] <= 0.05 * 180 and short.evaluated_windows is not None
    assert long.evaluated_windows is None
