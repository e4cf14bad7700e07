"""The cache against full forward passes, the cached generators against the oracle, and the reference vectors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from niels_gpt.config import NEW, V1, V2, Architecture, ModelConfig
from niels_gpt.infer.kv_cache import (
    KVCache,
    allocate_kv_cache,
    decode_step,
    generate_ids_cached,
    generate_ids_greedy_cached,
    generate_ids_greedy_full,
    prefill,
)
from niels_gpt.model.gpt import GPT
from tests.reference import BUNDLE, needs_bundle
from tests.varied import random_ids, varied_model

ARCHITECTURES = [pytest.param(V1, id="v1"), pytest.param(V2, id="v2"), pytest.param(NEW, id="new")]


def new_cache(model: GPT, *, B: int = 1, T_max: int | None = None) -> KVCache:
    cfg = model.cfg
    return allocate_kv_cache(
        L=cfg.L, B=B, H=cfg.H, T_max=T_max or cfg.T, D=cfg.C // cfg.H, device="cpu", dtype=torch.float32
    )


@torch.no_grad()
def full_logits(model: GPT, x: Tensor) -> Tensor:
    return model(x)


class TestCacheAgainstFullForward:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("prompt_length", [1, 2, 17, 31, 32])
    def test_prefill_and_every_decode_step_give_the_full_models_logits(
        self, arch: Architecture, prompt_length: int
    ) -> None:
        model = varied_model(arch)
        x = torch.tensor([random_ids(32, 61, seed=1), random_ids(32, 61, seed=2)])
        expected = full_logits(model, x)
        logits, cache, trace = prefill(model, x[:, :prompt_length], new_cache(model, B=2))
        assert trace is None and cache.t == prompt_length
        torch.testing.assert_close(logits, expected[:, :prompt_length], atol=1e-5, rtol=1e-5)
        for t in range(prompt_length, 32):
            logits, cache, _ = decode_step(model, x[:, t : t + 1], cache)
            torch.testing.assert_close(logits, expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
        assert cache.t == 32

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_traced_rows_equal_those_of_a_full_traced_forward(self, arch: Architecture) -> None:
        model = varied_model(arch)
        x = torch.tensor([random_ids(12, 61, seed=1), random_ids(12, 61, seed=2)])
        cache = new_cache(model, B=2)
        for t in range(5, 13):
            feed = x[:, :5] if t == 5 else x[:, t - 1 : t]
            step = prefill if t == 5 else decode_step
            logits, cache, trace = step(model, feed, cache, trace_layer=1, return_attn_row=True)
            with torch.no_grad():
                expected, row = model.forward_with_attn_trace(x[:, :t], trace_layer=1)
            assert trace is not None and trace["layer"] == 1
            assert trace["attn_row"].shape == (2, 2, t)
            torch.testing.assert_close(trace["attn_row"], row["attn_row"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-5, rtol=1e-5)

    def test_a_trace_is_returned_only_when_it_is_asked_for_in_full(self) -> None:
        model, x = varied_model(), torch.tensor([[1, 2, 3]])
        assert prefill(model, x, new_cache(model), trace_layer=0)[2] is None
        assert prefill(model, x, new_cache(model), return_attn_row=True)[2] is None

    def test_a_prompt_may_continue_a_filled_cache_in_chunks(self) -> None:
        model = varied_model()
        x = torch.tensor([random_ids(20, 61)])
        _, cache, _ = prefill(model, x[:, :7], new_cache(model))
        with torch.no_grad():
            logits = model(x[:, 7:], cache=cache)
        torch.testing.assert_close(logits, full_logits(model, x)[:, 7:], atol=1e-5, rtol=1e-5)

    def test_a_half_precision_cache_serves_a_float32_model(self) -> None:
        model = varied_model()
        x = torch.tensor([random_ids(10, 61)])
        cache = allocate_kv_cache(L=2, B=1, H=2, T_max=10, D=12, device="cpu", dtype=torch.float16)
        _, cache, _ = prefill(model, x[:, :9], cache)
        logits, cache, _ = decode_step(model, x[:, 9:], cache)
        assert cache.k.dtype == torch.float16 and logits.dtype == torch.float32
        torch.testing.assert_close(logits, full_logits(model, x)[:, 9:], atol=0.05, rtol=0)

    def test_nothing_is_copied_but_the_new_positions(self) -> None:
        model = varied_model()
        cache = new_cache(model)
        memory = cache.k.data_ptr()
        prefill(model, torch.tensor([[1, 2, 3]]), cache)
        k, v = cache.layer(1).append(torch.ones(1, 2, 1, 12), torch.ones(1, 2, 1, 12))
        assert cache.k.data_ptr() == memory
        assert k.data_ptr() == cache.k[1].data_ptr() and v.data_ptr() == cache.v[1].data_ptr()
        assert k.shape == (1, 2, 4, 12) and bool((cache.k[1, :, :, 3] == 1).all()) and not cache.k[:, :, :, 4:].any()


class TestRefusals:
    def test_prefill_wants_an_empty_cache(self) -> None:
        model, x = varied_model(), torch.tensor([[1, 2, 3]])
        _, cache, _ = prefill(model, x, new_cache(model))
        with pytest.raises(AssertionError, match="empty"):
            prefill(model, x, cache)

    @pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 1, 3)])
    def test_prefill_wants_rows_of_ids(self, shape: tuple[int, ...]) -> None:
        model = varied_model()
        with pytest.raises(AssertionError, match="ids must be"):
            prefill(model, torch.zeros(shape, dtype=torch.long), new_cache(model))

    @pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 0)])
    def test_decode_wants_one_token_per_row(self, shape: tuple[int, ...]) -> None:
        model = varied_model()
        with pytest.raises(AssertionError, match="one token"):
            decode_step(model, torch.zeros(shape, dtype=torch.long), new_cache(model))

    def test_overflow_is_refused_before_anything_is_written(self) -> None:
        model = varied_model()
        cache = new_cache(model, T_max=4)
        with pytest.raises(AssertionError, match="T_max"):
            prefill(model, torch.tensor([[1, 2, 3, 4, 5]]), cache)
        _, cache, _ = prefill(model, torch.tensor([[1, 2, 3, 4]]), cache)
        before = cache.k.clone()
        with pytest.raises(AssertionError, match="T_max"):
            decode_step(model, torch.tensor([[5]]), cache)
        assert cache.t == 4 and torch.equal(cache.k, before)

    def test_a_cache_of_another_batch_or_model_is_refused(self) -> None:
        model = varied_model()
        with pytest.raises(AssertionError, match="model and ids need"):
            prefill(model, torch.tensor([[1], [2]]), new_cache(model, B=1))
        with pytest.raises(AssertionError, match="model and ids need"):
            prefill(model, torch.tensor([[1]]), new_cache(varied_model(L=3)))

    @pytest.mark.parametrize("generate", [generate_ids_greedy_cached, generate_ids_greedy_full])
    def test_generation_past_the_context_is_refused_up_front(self, generate: Any) -> None:
        model = varied_model()
        with pytest.raises(ValueError, match="exceeds T_max"):
            generate(model, list(range(20)), max_new_tokens=13, eot_token_id=None)
        assert len(generate(model, list(range(20)), max_new_tokens=12, eot_token_id=None)) == 32


class TestCachedGeneratorsAgainstTheOracle:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("prompt_length", [1, 2, 16, 31])
    def test_greedy_ids_are_the_oracles(self, arch: Architecture, prompt_length: int) -> None:
        model = varied_model(arch)
        prompt = random_ids(prompt_length, 61)
        n = min(16, 32 - prompt_length)
        expected = generate_ids_greedy_full(model, prompt, max_new_tokens=n, eot_token_id=None)
        assert n < 16 or len(set(expected[prompt_length:])) >= 6, "the output does not vary enough to test with"
        assert generate_ids_greedy_cached(model, prompt, max_new_tokens=n, eot_token_id=None) == expected
        assert generate_ids_greedy_cached(model, torch.tensor(prompt), max_new_tokens=n, eot_token_id=None) == expected

    @pytest.mark.parametrize("generate", [generate_ids_greedy_cached, generate_ids_greedy_full])
    def test_the_end_of_text_token_is_returned_and_ends_it(self, generate: Any) -> None:
        model = varied_model()
        everything = generate(model, [3, 1, 4], max_new_tokens=12, eot_token_id=None)
        first = everything.index(everything[7], 3)
        stopped = generate(model, [3, 1, 4], max_new_tokens=12, eot_token_id=everything[7])
        assert stopped == everything[: first + 1]

    def test_id_zero_can_end_a_text(self) -> None:
        model = varied_model()
        with torch.no_grad():
            model.tok_emb.weight[0] = 100 * model.hidden(torch.tensor([[5]]))[0, -1]
        assert generate_ids_greedy_cached(model, [5], max_new_tokens=9, eot_token_id=0) == [5, 0]

    def test_attention_rows_cover_the_query_that_chose_the_token(self) -> None:
        model = varied_model()
        prompt = random_ids(5, 61)
        result = generate_ids_cached(model, prompt, max_new_tokens=6, eot_token_id=None, temperature=0, trace_layer=1)
        assert result["ids"] == generate_ids_greedy_full(model, prompt, max_new_tokens=6, eot_token_id=None)
        assert [step["token_id"] for step in result["steps"]] == result["ids"][5:]
        for i, step in enumerate(result["steps"]):
            with torch.no_grad():
                _, trace = model.forward_with_attn_trace(torch.tensor([result["ids"][: 5 + i]]), trace_layer=1)
            np.testing.assert_allclose(step["attn_row"], trace["attn_row"][0], atol=1e-5)  # type: ignore[index]

    def test_rows_are_absent_without_a_traced_layer(self) -> None:
        result = generate_ids_cached(varied_model(), [1], max_new_tokens=2, eot_token_id=None, temperature=0)
        assert [step["attn_row"] for step in result["steps"]] == [None, None]

    def test_the_training_mode_comes_back(self) -> None:
        model = varied_model().train()
        x = torch.tensor([[1, 2]])
        first, cache, _ = prefill(model, x, new_cache(model))
        torch.testing.assert_close(first, full_logits(model.eval(), x), atol=1e-5, rtol=1e-5)
        model.train()
        decode_step(model, x[:, :1], cache)
        generate_ids_greedy_full(model, [1], max_new_tokens=1, eot_token_id=None)
        assert model.training and all(m.training for m in model.modules())
        assert not first.requires_grad


@pytest.fixture(scope="module")
def model() -> GPT:
    loaded = torch.load(BUNDLE / "v2/checkpoint/lib_no_opt.pt", weights_only=True)
    model = GPT(ModelConfig.from_dict(loaded["model_cfg"]), V2)
    model.load_state_dict(loaded["model_state"])
    return model.eval()


@needs_bundle
class TestReferenceVectors:
    @staticmethod
    def vector(name: str) -> np.ndarray:
        return np.load(BUNDLE / "v2/vectors" / name)

    def test_prefill_decode_and_stored_keys(self, model: GPT) -> None:
        x = torch.from_numpy(self.vector("input_2x40.npy"))[:1]
        logits, cache, trace = prefill(model, x[:, :10], new_cache(model), trace_layer=2, return_attn_row=True)
        np.testing.assert_allclose(logits, self.vector("prefill_logits_10.npy"), atol=1e-4)
        assert trace is not None
        np.testing.assert_allclose(trace["attn_row"], self.vector("prefill_attn_row_layer2.npy"), atol=1e-5)
        decoded: list[Tensor] = []
        rows: dict[int, Any] = {}
        for t in range(10, 20):
            logits, cache, trace = decode_step(model, x[:, t : t + 1], cache, trace_layer=2, return_attn_row=True)
            decoded.append(logits)
            rows[t] = trace["attn_row"] if trace else None
        np.testing.assert_allclose(torch.cat(decoded, 1), self.vector("decode_logits_10_20.npy"), atol=1e-4)
        for t in (10, 19):
            np.testing.assert_allclose(rows[t], self.vector(f"decode_attn_row_layer2_pos{t}.npy"), atol=1e-5)
        stored = np.load(BUNDLE / "v2/vectors/kv_cache_after_20.npz")
        assert cache.t == int(stored["t"])
        np.testing.assert_allclose(cache.k[:, :, :, :20], stored["k"], atol=1e-4)
        np.testing.assert_allclose(cache.v[:, :, :, :20], stored["v"], atol=1e-4)

    @pytest.mark.parametrize("name", ["p_ids_small", "p_tokenized", "p_chat"])
    def test_greedy_generation(self, model: GPT, name: str) -> None:
        case = json.loads((BUNDLE / "v2/vectors/generation.json").read_text())[name]
        for generate in (generate_ids_greedy_full, generate_ids_greedy_cached):
            ids = generate(model, case["prompt_ids"], max_new_tokens=case["max_new_tokens"], eot_token_id=case["eot"])
            assert ids == case["greedy_full"], generate.__name__

    def test_end_of_text(self, model: GPT) -> None:
        case = json.loads((BUNDLE / "v2/vectors/generation.json").read_text())["eot_stop_case"]
        for generate in (generate_ids_greedy_full, generate_ids_greedy_cached):
            ids = generate(model, case["prompt_ids"], max_new_tokens=24, eot_token_id=case["eot_used"])
            assert ids == case["greedy_full"], generate.__name__
