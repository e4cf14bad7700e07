"""How a token is chosen: the filters by their definitions, draws by the distribution, senseless values refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from niels_gpt.generate import Sampling, min_p_filter, sample_next_token, top_k_filter, top_p_filter
from niels_gpt.infer.kv_cache import generate_ids_cached
from niels_gpt.infer.sampling import penalize_repetition, shape
from tests.reference import BUNDLE, needs_bundle
from tests.varied import seeded, varied_model

rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)


class TestFilters:
    @given(rows, st.integers(1, 60))
    def test_exactly_k_survive_and_none_beats_them(self, logits: Tensor, k: int) -> None:
        kept = top_k_filter(logits, k).isfinite()
        assert int(kept.sum()) == min(k, len(logits))
        assert torch.equal(top_k_filter(logits, k)[kept], logits[kept])
        assert bool(kept.all()) or logits[kept].min() >= logits[~kept].max()

    def test_ties_do_not_let_more_than_k_through(self) -> None:
        assert int(top_k_filter(torch.zeros(3, 10), 4).isfinite().sum(-1).unique()) == 4

    @given(rows, st.floats(0, 1))
    def test_the_smallest_prefix_of_mass_p_survives(self, logits: Tensor, p: float) -> None:
        kept = top_p_filter(logits, p).isfinite()
        probs = logits.double().softmax(-1)
        assert kept.any()
        assert probs[kept].sum() >= p - 1e-6
        if int(kept.sum()) > 1:
            assert probs[kept].sum() - probs[kept].min() < p + 1e-6
        assert bool(kept.all()) or logits[kept].min() >= logits[~kept].max()

    def test_the_token_that_crosses_the_threshold_stays(self) -> None:
        logits = torch.tensor([0.1, 0.6, 0.3]).log()
        assert top_p_filter(logits, 0.5).isfinite().tolist() == [False, True, False]
        assert top_p_filter(logits, 0.7).isfinite().tolist() == [False, True, True]

    @given(rows, st.floats(1, 5), st.data())
    def test_a_penalty_never_favours_a_seen_token(self, logits: Tensor, penalty: float, data: st.DataObject) -> None:
        seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))))
        penalized = penalize_repetition(logits, seen, penalty)
        assert bool((penalized <= logits).all()) and torch.equal(penalized[~seen], logits[~seen])


class TestMinP:
    def test_it_keeps_what_has_the_share_of_the_best(self) -> None:
        probs = torch.tensor([0.5, 0.26, 0.14, 0.1])
        for p, kept in [(0.5, 2), (0.2, 4), (0.25, 3), (1.0, 1)]:
            assert int(min_p_filter(probs.log(), p).isfinite().sum()) == kept
        assert torch.equal(min_p_filter(probs.log(), 0.0), probs.log())

    def test_equals_of_the_best_stay(self) -> None:
        assert int(min_p_filter(torch.zeros(5), 1.0).isfinite().sum()) == 5

    def test_it_counts_after_the_temperature(self) -> None:
        logits = torch.tensor([0.0, -2.0])
        assert int(shape(logits, Sampling(1.0, min_p=0.3)).isfinite().sum()) == 1
        assert int(shape(logits, Sampling(2.0, min_p=0.3)).isfinite().sum()) == 2  # e^-1 > 0.3

    def test_it_reaches_the_cached_generator(self) -> None:
        model = varied_model()
        greedy = generate_ids_cached(model, [5], max_new_tokens=9, eot_token_id=None, temperature=0)["ids"]
        options = {"max_new_tokens": 9, "eot_token_id": None, "temperature": 3.0}
        strict = generate_ids_cached(model, [5], min_p=1.0, generator=torch.Generator().manual_seed(1), **options)
        loose = generate_ids_cached(model, [5], generator=torch.Generator().manual_seed(1), **options)
        assert strict["ids"] == greedy != loose["ids"]

    @pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
    def test_senseless_values_are_refused(self, bad: float) -> None:
        with pytest.raises(ValueError, match="min_p"):
            Sampling(1.0, min_p=bad)


class TestSampleNextToken:
    def test_zero_temperature_is_argmax_and_negative_is_an_error(self) -> None:
        assert sample_next_token(torch.tensor([1.0, 5.0, 2.0]), temperature=0) == 1
        with pytest.raises(ValueError, match="temperature must be >= 0"):
            sample_next_token(torch.tensor([1.0]), temperature=-0.1)

    @pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-5])
    @pytest.mark.parametrize("logits", [[1.0, 5.0, 2.0], [-9.0, -3.0, -4.0], [0.0, 0.5, -1.0]])
    def test_a_temperature_too_small_to_divide_by_is_greedy(self, temperature: float, logits: list[float]) -> None:
        for options in ({}, {"top_k": 2}, {"top_p": 0.9}):
            assert sample_next_token(torch.tensor(logits), temperature=temperature, **options) == 1

    def test_k_above_the_vocabulary_and_zero_both_mean_everything(self) -> None:
        logits = torch.randn(20, generator=seeded())
        plain = sample_next_token(logits, temperature=1.0, generator=seeded())
        for k in (0, 20, 10**9):
            assert sample_next_token(logits, temperature=1.0, top_k=k, generator=seeded()) == plain

    def test_a_dominating_token_survives_any_p(self) -> None:
        logits = torch.tensor([0.0, 30.0, 0.0])
        for p in (0.1, 0.9, 1.0):
            assert sample_next_token(logits, temperature=1.0, top_p=p, generator=seeded()) == 1

    def test_draws_follow_the_distribution(self) -> None:
        logits, generator = torch.tensor([0.2, 0.5, 0.3]).log(), seeded()
        counts = Counter(sample_next_token(logits, temperature=1.0, generator=generator) for _ in range(4000))
        assert [round(counts[i] / 4000, 1) for i in range(3)] == [0.2, 0.5, 0.3]

    @needs_bundle
    def test_reference_draws(self) -> None:
        vectors = json.loads((BUNDLE / "v2/vectors/sampling.json").read_text())
        logits = torch.tensor(vectors["logits"])
        for case in vectors["cases"]:
            generator = seeded(case["seed"])
            options = {"temperature": case["temperature"], "top_k": case["top_k"], "generator": generator}
            assert [sample_next_token(logits, **options) for _ in range(20)] == case["tokens_20"]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
    ],
)
def test_senseless_sampling_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**{"temperature": 1.0, **bad})
