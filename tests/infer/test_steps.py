"""What a step tells beyond its token, what a memory spares, and how a long text rolls on; the rest is in
test_generate.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from niels_gpt.config import NEW, V1, V2, Architecture
from niels_gpt.infer.sampling import Sampling, shape
from niels_gpt.infer.steps import Memory, Step, stream_steps
from niels_gpt.model.gpt import GPT
from tests.varied import random_ids, varied_model

GREEDY = Sampling(temperature=0)


def steps_of(model: GPT, prompt: list[int], n: int = 8, sampling: Sampling = GREEDY, **options: Any) -> list[Step]:
    generator = torch.Generator().manual_seed(3)
    return list(stream_steps(model, prompt, max_new_tokens=n, sampling=sampling, generator=generator, **options))


def ids_of(*args: Any, **options: Any) -> list[int]:
    return [step.token_id for step in steps_of(*args, **options)]


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


class TestFullContext:
    @staticmethod
    def rolling_oracle(model: GPT, ids: list[int], n: int) -> list[int]:
        """Greedy full forward passes over a window that falls back to its last half when it is full."""
        T, start, new = model.cfg.T, max(0, len(ids) - model.cfg.T), list[int]()
        for _ in range(n):
            everything = ids + new
            if len(everything) - start > T:
                start = len(everything) - T // 2
            with torch.no_grad():
                new.append(int(model(torch.tensor([everything[start:]]))[0, -1].argmax()))
        return new

    @pytest.mark.parametrize("prompt_length", [1, 31, 32, 33, 80])
    def test_the_cached_stream_rolls_on(self, prompt_length: int) -> None:
        model, prompt = varied_model(), random_ids(prompt_length, 61)
        ids = ids_of(model, prompt, 70)
        assert ids == self.rolling_oracle(model, prompt, 70)
        assert len(set(ids)) >= 6

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_a_context_of_one_token_works(self, use_cache: bool) -> None:
        model = varied_model(T=1)
        ids = [5]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids[-1:]]))[0, -1].argmax()))
        assert ids_of(model, [5], 6, use_cache=use_cache) == ids[1:]

    def test_the_uncached_stream_keeps_the_last_T(self) -> None:
        model, ids = varied_model(), random_ids(30, 61)
        new = ids_of(model, ids, 20, use_cache=False)
        for token_id in new:
            with torch.no_grad():
                assert token_id == int(model(torch.tensor([ids[-32:]]))[0, -1].argmax())
            ids = [*ids, token_id]

    def test_traced_rows_go_on_after_rolling(self) -> None:
        steps = list(stream_steps(varied_model(), [1] * 30, max_new_tokens=20, sampling=GREEDY, trace_layer=0))
        lengths = [step.attn_row.shape[1] for step in steps if step.attn_row is not None]
        assert lengths == [30, 31, 32, *range(16, 33)]
        assert all(abs(float(step.attn_row.sum(-1).mean()) - 1) < 1e-5 for step in steps if step.attn_row is not None)
