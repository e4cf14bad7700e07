"""What a step tells beyond its token, what a memory spares, and how a long text rolls on; the rest is in
test_generate.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from niels_gpt.config import NEW, V1, V2, Architecture
from niels_gpt.generate import Memory, Sampling, Step, min_p_filter, stream_steps
from niels_gpt.infer.kv_cache import generate_ids_cached
from niels_gpt.infer.sampling import shape
from niels_gpt.model.gpt import GPT
from tests.varied import random_ids, varied_model

GREEDY = Sampling(temperature=0)


def steps_of(model: GPT, prompt: list[int], n: int = 8, sampling: Sampling = GREEDY, **options: Any) -> list[Step]:
    generator = torch.Generator().manual_seed(3)
    return list(stream_steps(model, prompt, max_new_tokens=n, sampling=sampling, generator=generator, **options))


def ids_of(*args: Any, **options: Any) -> list[int]:
    return [step.token_id for step in steps_of(*args, **options)]


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


class TestSampledAlternatives:
    @pytest.mark.parametrize("native", [True, False])
    def test_they_are_what_was_drawn_from(self, native: bool) -> None:
        model, sampling = varied_model(), Sampling(0.7, 6, 0.8, 1.4)
        ids = random_ids(5, 61)
        for step in steps_of(model, ids, sampling=sampling, banned_ids=(1, 2), top_n=4, native=native):
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1]
            logits[[1, 2]] = -math.inf
            seen = torch.zeros(61, dtype=torch.bool)
            seen[ids] = True
            logits = torch.where(seen, torch.where(logits > 0, logits / 1.4, logits * 1.4), logits)
            logp = shape(logits, sampling).log_softmax(-1)
            possible = min(4, int(logp.isfinite().sum()))
            best = logp.topk(possible)
            assert [i for i, _ in step.sampled] == best.indices.tolist()
            assert [p for _, p in step.sampled] == pytest.approx(best.values.tolist(), abs=1e-4)
            ids.append(step.token_id)

    def test_greedy_has_one_choice(self) -> None:
        (step,) = steps_of(varied_model(), [1], 1, top_n=3)
        assert step.sampled == [(step.token_id, 0.0)] and len(step.top) == 3


class TestLogitLens:
    @pytest.mark.parametrize("arch", [V1, V2, NEW], ids=["v1", "v2", "new"])
    def test_each_layer_reads_as_if_the_model_ended_there(self, arch: Architecture) -> None:
        model, ids = varied_model(arch, L=3), random_ids(4, 61)
        plain = ids_of(model, ids, 6)
        steps = steps_of(model, ids, 6, lens_n=5, top_n=5)
        assert [s.token_id for s in steps] == plain
        for step in steps:
            assert step.lens is not None and len(step.lens) == 3
            with torch.no_grad():
                h = model.tok_emb(torch.tensor([ids]))
                for block, found in zip(model.blocks, step.lens, strict=True):
                    h = block(h)
                    best = model.lm_head(model.ln_f(h))[0, -1].log_softmax(-1).topk(5)
                    assert [i for i, _ in found] == best.indices.tolist()
                    assert [p for _, p in found] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [i for i, _ in step.lens[-1]] == [i for i, _ in step.top]
            ids.append(step.token_id)
        assert not any(block._forward_hooks for block in model.blocks)

    def test_it_works_beside_a_traced_layer_and_without_a_cache(self) -> None:
        model = varied_model()
        cached = steps_of(model, [1, 2], 4, lens_n=2, trace_layer=0)
        plain = steps_of(model, [1, 2], 4, lens_n=2, trace_layer=0, use_cache=False)
        for a, b in zip(cached, plain, strict=True):
            assert a.lens is not None and b.lens is not None
            assert [[i for i, _ in layer] for layer in a.lens] == [[i for i, _ in layer] for layer in b.lens]
            torch.testing.assert_close(a.attn_row, b.attn_row, atol=1e-5, rtol=0)
        assert steps_of(model, [1], 1)[0].lens is None
        with pytest.raises(ValueError, match="lens_n"):
            steps_of(model, [1], 1, lens_n=-1)


class TestMemory:
    @pytest.mark.parametrize("native", [True, False])
    def test_a_chat_reads_each_turn_once(self, native: bool) -> None:
        model, memory, chat = varied_model(), Memory(varied_model(), native=native), random_ids(5, 61)
        memory = Memory(model, native=native)
        for turn in range(4):
            before = memory.fed
            reply = ids_of(model, chat, 3, memory=memory)
            assert reply == ids_of(model, chat, 3, native=False)
            fresh = len(chat) if turn == 0 else 3  # the last token of the reply before, and two of the user's
            assert memory.fed - before == fresh + 2
            chat = [*chat, *reply, *random_ids(2, 61, seed=turn)]

    def test_another_text_another_ending_and_the_same_again(self) -> None:
        model = varied_model()
        memory, first = Memory(model), random_ids(10, 61)
        texts = [first, first, [*first[:6], 7, 8], first[:4], [3], [*first, *random_ids(30, 61)]]
        for text in texts:
            assert ids_of(model, text, 25, memory=memory) == ids_of(model, text, 25, native=False)

    def test_a_stream_that_is_left_leaves_a_sound_memory(self) -> None:
        model = varied_model()
        memory = Memory(model)
        stream = stream_steps(model, [1, 2, 3], max_new_tokens=9, sampling=GREEDY, memory=memory)
        next(stream), next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert ids_of(model, [1, 2, 3], 9, memory=memory) == ids_of(model, [1, 2, 3], 9)

    def test_watched_and_unwatched_turns_share_it(self) -> None:
        model, ids = varied_model(), random_ids(6, 61)
        memory = Memory(model)
        ids_of(model, ids, 4, memory=memory)
        watched = steps_of(model, [*ids, 9], 4, memory=memory, trace_layer=1, lens_n=1)
        plain = steps_of(model, [*ids, 9], 4, trace_layer=1, lens_n=1, native=False)
        assert [s.token_id for s in watched] == [s.token_id for s in plain]
        torch.testing.assert_close(watched[0].attn_row, plain[0].attn_row, atol=1e-5, rtol=0)

    def test_it_serves_its_own_model_only(self) -> None:
        with pytest.raises(ValueError, match="another model"):
            steps_of(varied_model(), [1], memory=Memory(varied_model()))


class TestRolling:
    def test_sliding_keeps_the_last_context_with_and_without_a_cache(self) -> None:
        model, prompt = varied_model(), random_ids(20, 61)
        sliding = ids_of(model, prompt, 40, rolling="slide")
        assert sliding == ids_of(model, prompt, 40, use_cache=False)
        assert sliding[:13] == ids_of(model, prompt, 40)[:13] and sliding != ids_of(model, prompt, 40)
