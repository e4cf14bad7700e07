"""The stream of steps and the text helpers; what the cache computes is tested in infer/test_kv_cache.py."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from niels_gpt.config import V1, V2, ModelConfig
from niels_gpt.generate import StopText, generate_ids, generate_text
from niels_gpt.infer.kv_cache import generate_ids_cached, generate_ids_greedy_full
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import Step, stream_steps
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import GenerationSettings
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.reference import BUNDLE, needs_bundle
from tests.varied import random_ids, seeded, varied_model

GREEDY = Sampling(temperature=0)


def ids_of(model: GPT, prompt: list[int], n: int = 12, sampling: Sampling = GREEDY, **options: Any) -> list[int]:
    return [s.token_id for s in stream_steps(model, prompt, max_new_tokens=n, sampling=sampling, **options)]


class TestStream:
    @pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 20), Sampling(1.2, 30, 0.8, 1.3)])
    @pytest.mark.parametrize("prompt_length", [1, 2, 20])
    def test_cached_and_uncached_are_the_same_while_the_context_lasts(
        self, sampling: Sampling, prompt_length: int
    ) -> None:
        model, prompt = varied_model(), random_ids(prompt_length, 61)
        cached = ids_of(model, prompt, 12, sampling, generator=seeded())
        assert cached == ids_of(model, prompt, 12, sampling, generator=seeded(), use_cache=False)
        assert len(set(cached)) >= 6

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_each_step_describes_the_raw_distribution(self, use_cache: bool) -> None:
        model, ids = varied_model(), random_ids(7, 61)
        steps = stream_steps(
            model,
            ids,
            max_new_tokens=6,
            sampling=Sampling(0.5, 3, 0.9, 1.5),
            generator=seeded(),
            banned_ids=(0, 1),
            top_n=4,
            trace_layer=1,
            use_cache=use_cache,
        )
        for step in steps:
            with torch.no_grad():
                logits, trace = model.forward_with_attn_trace(torch.tensor([ids]), trace_layer=1)
            logp = logits[0, -1].log_softmax(-1)
            assert step.logprob == pytest.approx(float(logp[step.token_id]), abs=1e-5)
            assert step.entropy == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-5)
            best = logp.topk(4)
            assert [i for i, _ in step.top] == best.indices.tolist()
            assert [p for _, p in step.top] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert step.attn_row is not None and isinstance(trace["attn_row"], Tensor)
            torch.testing.assert_close(step.attn_row, trace["attn_row"][0], atol=1e-5, rtol=0)
            assert step.text == ""  # no tokenizer
            ids.append(step.token_id)

    def test_nothing_extra_is_kept_unless_asked(self) -> None:
        (step,) = stream_steps(varied_model(), [1], max_new_tokens=1, sampling=GREEDY)
        assert step == Step(step.token_id, "", step.logprob, step.entropy, [], None)

    def test_the_stop_token_is_yielded_and_ends_the_stream(self) -> None:
        model = varied_model()
        everything = ids_of(model, [3, 1, 4])
        first = everything.index(everything[5])
        assert ids_of(model, [3, 1, 4], stop_ids={everything[5]}) == everything[: first + 1]

    def test_banned_ids_never_come_whatever_else_is_asked(self) -> None:
        model, banned = varied_model(), set(range(0, 61, 2))
        for sampling in (GREEDY, Sampling(2.0), Sampling(1.0, 5, 0.5, 3.0)):
            assert not banned & set(ids_of(model, [5], 30, sampling, generator=seeded(), banned_ids=banned))

    def test_the_order_is_bans_then_repetition_then_top_k(self) -> None:
        model = varied_model()
        with torch.no_grad():
            best, second = model(torch.tensor([[5]]))[0, -1].topk(2).indices.tolist()
        assert ids_of(model, [5], 1) == [best]
        assert ids_of(model, [5], 1, Sampling(1.0, top_k=1), banned_ids=[best]) == [second]
        huge = Sampling(1.0, top_k=1, repetition_penalty=1e6)
        later = ids_of(model, [5], 30, huge)
        assert len(set(later)) == 30 and 5 not in later  # with every seen token pushed down, none repeats

    def test_same_seed_same_ids_and_other_seeds_differ(self) -> None:
        model, hot = varied_model(), Sampling(1.5)
        assert ids_of(model, [5], 12, hot, generator=seeded(1)) == ids_of(model, [5], 12, hot, generator=seeded(1))
        assert ids_of(model, [5], 12, hot, generator=seeded(1)) != ids_of(model, [5], 12, hot, generator=seeded(2))

    def test_the_global_random_state_is_left_alone(self) -> None:
        model = varied_model()
        before = torch.random.get_rng_state()
        ids_of(model, [5], 5, Sampling(1.0), generator=seeded())
        assert torch.equal(before, torch.random.get_rng_state())

    def test_zero_tokens_is_an_empty_stream(self) -> None:
        assert ids_of(varied_model(), [1], 0) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_ids": []}, "no tokens"),
            ({"prompt_ids": [61]}, "prompt id 61 is outside"),
            ({"prompt_ids": [-1]}, "prompt id -1 is outside"),
            ({"prompt_ids": torch.tensor([[1, 2]])}, "1-D"),
            ({"max_new_tokens": -1}, "max_new_tokens"),
            ({"trace_layer": 2}, "layers 0..1"),
            ({"banned_ids": [61]}, "banned"),
            ({"banned_ids": range(61)}, "every token is banned"),
            ({"context": 33}, "context"),
            ({"context": 0}, "context"),
        ],
    )
    def test_bad_arguments_fail_at_the_call(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stream_steps(varied_model(), **{"prompt_ids": [1], "max_new_tokens": 1, "sampling": GREEDY, **options})

    def test_a_diverged_model_is_named_as_such(self) -> None:
        model = varied_model()
        with torch.no_grad():
            next(model.ln_f.parameters()).fill_(math.nan)
        with pytest.raises(ValueError, match="non-finite"):
            ids_of(model, [1])


class TestTrainingMode:
    @pytest.mark.parametrize("training", [True, False])
    def test_it_comes_back_after_the_end_a_close_and_an_exception(self, training: bool) -> None:
        model = varied_model().train(training)
        list(stream_steps(model, [1], max_new_tokens=2, sampling=GREEDY))
        assert model.training is training

        stream = stream_steps(model, [1], max_new_tokens=9, sampling=GREEDY)
        next(stream)
        assert not model.training and not model.blocks[0].training
        stream.close()  # type: ignore[attr-defined]
        assert model.training is training

        model.ln_f.register_forward_hook(self.fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            next(stream_steps(model, [1], max_new_tokens=9, sampling=GREEDY))
        assert model.training is training and model.blocks[0].training is training

    @staticmethod
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    def test_dropout_is_off_and_gradients_are_not_recorded(self) -> None:
        model = varied_model().train()
        assert ids_of(model, [3, 1, 4]) == ids_of(model.eval(), [3, 1, 4])

    def test_the_reader_of_a_stream_may_train_between_its_steps(self) -> None:
        model, other = varied_model(), torch.nn.Linear(2, 2)
        for _ in stream_steps(model, [1], max_new_tokens=2, sampling=GREEDY):
            other(torch.ones(2)).sum().backward()
        assert other.weight.grad is not None


class TestText:
    def test_text_is_whole_characters_that_join_to_the_decoded_ids(self) -> None:
        model, tokenizer = varied_model(V=256), ByteTokenizer()
        hot = Sampling(3.0)
        steps = list(
            stream_steps(model, [65], max_new_tokens=28, sampling=hot, generator=seeded(), tokenizer=tokenizer)
        )
        assert "".join(s.text for s in steps) == tokenizer.decode([s.token_id for s in steps])
        assert any(s.text == "" for s in steps[:-1])  # a lead byte waits for the rest of its character

    def test_a_character_split_over_tokens_arrives_whole(self) -> None:
        model, text = scripted_model("né😀!"), ByteTokenizer()
        steps = stream_steps(model, [0], max_new_tokens=8, sampling=GREEDY, tokenizer=text)
        assert [s.text for s in steps] == ["n", "", "é", "", "", "", "😀", "!"]

    def test_an_unfinished_character_is_flushed_with_the_last_step(self) -> None:
        model, text = scripted_model("n😀!"), ByteTokenizer()
        cut = stream_steps(model, [0], max_new_tokens=3, sampling=GREEDY, tokenizer=text)
        assert [s.text for s in cut] == ["n", "", "\ufffd"]
        stopped = stream_steps(model, [0], max_new_tokens=9, sampling=GREEDY, tokenizer=text, stop_ids={0x9F})
        assert [s.text for s in stopped] == ["n", "", "\ufffd"]

    def test_a_stop_token_adds_no_text(self) -> None:
        model, text = scripted_model("hi!x"), ByteTokenizer()
        steps = list(stream_steps(model, [0], max_new_tokens=9, sampling=GREEDY, tokenizer=text, stop_ids={ord("!")}))
        assert [s.text for s in steps] == ["h", "i", ""] and steps[-1].token_id == ord("!")

    def test_ids_that_the_tokenizer_does_not_know_are_never_chosen(self) -> None:
        model = varied_model(V=300)
        ids = ids_of(model, [1], 31, Sampling(50.0), generator=seeded())
        assert max(ids) >= 256
        assert max(ids_of(model, [1], 31, Sampling(50.0), generator=seeded(), tokenizer=ByteTokenizer())) < 256


def scripted_model(text: str) -> GPT:
    """A byte model that says `text` after the id 0, byte for byte; no byte may come twice."""
    says = [0, *text.encode()]
    assert len(set(says)) == len(says)
    model = varied_model(V1, V=256, T=16, C=256)
    with torch.no_grad():
        for parameter in model.blocks.parameters():  # so that only the newest id counts
            parameter.zero_()
        model.lm_head = torch.nn.Linear(256, 256, bias=False)
        model.lm_head.weight.zero_()
        for current, following in pairwise(says):
            model.lm_head.weight[following] = model.hidden(torch.tensor([[current]]))[0, -1]
    return model


class TestStopText:
    STOPS = ("\nuser: ", "\nsystem: ")

    @given(st.text(alphabet="\nuser: sytm", max_size=40), st.lists(st.integers(0, 40), max_size=8))
    @settings(max_examples=300)
    def test_any_cutting_into_pieces_gives_the_text_before_the_first_stop(self, text: str, cuts: list[int]) -> None:
        text += "\nuser: more\nuser: "
        stop, shown, at = StopText(self.STOPS), "", sorted({0, len(text), *(c for c in cuts if c <= len(text))})
        for start, end in pairwise(at):
            shown += stop.push(text[start:end])
            assert not any(s in shown for s in self.STOPS)
        first = min(i for i in (text.find(s) for s in self.STOPS) if i >= 0)
        assert stop.found and shown + stop.flush() == text[:first]
        assert stop.push("anything") == ""

    def test_text_that_only_began_like_a_stop_comes_with_the_flush(self) -> None:
        stop = StopText(self.STOPS)
        assert stop.push("hi\nuse") == "hi"
        assert stop.push("ful\nus") == "\nuseful"
        assert (stop.found, stop.flush(), stop.flush()) == (False, "\nus", "")

    def test_without_stops_everything_passes_at_once(self) -> None:
        stop = StopText(())
        assert stop.push("\nuser: ") == "\nuser: " and not stop.found

    def test_an_empty_stop_is_refused(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            StopText(["a", ""])


class TestGenerateIds:
    def test_stop_is_left_out_unlike_in_the_cached_functions(self) -> None:
        model = varied_model()
        everything = generate_ids_greedy_full(model, [3, 1, 4], max_new_tokens=12, eot_token_id=None)
        first = everything.index(everything[7], 3)
        ids = generate_ids(model, [3, 1, 4], max_new_tokens=12, T=32, temperature=0, eot_id=everything[7])
        assert ids.tolist() == everything[:first]
        assert ids.dtype == torch.int64 and ids.ndim == 1

    def test_tensor_prompts_and_the_devices_name(self) -> None:
        model, prompt = varied_model(), torch.tensor([3, 1, 4])
        ids = generate_ids(model, prompt, max_new_tokens=2, T=32, temperature=0, device="cpu")
        assert ids.tolist()[:3] == [3, 1, 4] and prompt.tolist() == [3, 1, 4]
        with pytest.raises(ValueError, match=r"model.to\('cuda'\)"):
            generate_ids(model, prompt, max_new_tokens=2, T=32, temperature=0, device="cuda")

    def test_generate_text_continues_the_prompt(self, tiny_tokenizer: SentencePieceTokenizer) -> None:
        model = varied_model(V=512)
        generation = GenerationSettings(max_new_tokens=8, temperature=0)
        text = generate_text(model, "hello", cfg=model.cfg, generation=generation, tokenizer=tiny_tokenizer)
        prompt = tiny_tokenizer.encode("hello")
        expected = generate_ids_greedy_full(model, prompt, max_new_tokens=8, eot_token_id=None)
        assert text == tiny_tokenizer.decode(expected) and text.startswith("hello")

    def test_generate_text_says_only_what_the_tokenizer_knows(self) -> None:
        model, generation = varied_model(V=300), GenerationSettings(max_new_tokens=26, temperature=2.0)
        said = generate_text(
            model, "hello", cfg=model.cfg, generation=generation, tokenizer=ByteTokenizer(), generator=seeded()
        )
        assert said.startswith("hello") and len(said.encode("utf-8", "replace")) > 20


@needs_bundle
class TestReferenceVectors:
    @staticmethod
    def load(path: str, arch: Any) -> GPT:
        loaded = torch.load(BUNDLE / path, weights_only=True)
        model = GPT(ModelConfig.from_dict(loaded["model_cfg"]), arch)
        model.load_state_dict(loaded["model_state"])
        return model.eval()

    def test_second_generation(self) -> None:
        model = self.load("v2/checkpoint/lib_no_opt.pt", V2)
        cases = json.loads((BUNDLE / "v2/vectors/generation.json").read_text())
        for name in ("p_ids_small", "p_tokenized", "p_chat"):
            case = cases[name]
            run = partial(generate_ids, model, case["prompt_ids"], max_new_tokens=24, eot_id=case["eot"])
            sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 50}
            assert run(T=64, temperature=0).tolist() == case["generate_ids_t0"]
            assert run(T=64, temperature=0, banned_token_ids=[3, 4, 5]).tolist() == case["generate_ids_t0_banned_roles"]
            assert run(T=64, **sampled, generator=seeded(42)).tolist() == case["generate_ids_t0.9_k50_seed42"]
            cropped = run(temperature=0.7, top_k=20, T=16, banned_token_ids=[3, 4, 5], generator=seeded(1))
            assert cropped.tolist() == case["generate_ids_t0.7_k20_seed1_T16_crop"]
            # The cached generator draws the same tokens, and returns the end of text as well.
            cached = generate_ids_cached(
                model, case["prompt_ids"], max_new_tokens=24, eot_token_id=6, **sampled, generator=seeded(42)
            )["ids"]
            assert cached[: -1 if cached[-1] == 6 else None] == case["generate_ids_t0.9_k50_seed42"]
        case = cases["eot_stop_case"]
        stopped = generate_ids(
            model, case["prompt_ids"], max_new_tokens=24, T=64, temperature=0, eot_id=case["eot_used"]
        )
        assert stopped.tolist() == case["generate_ids"]

    def test_first_generation(self) -> None:
        model = self.load("v1/best_with_opt.pt", V1)
        case = json.loads((BUNDLE / "v1/generation.json").read_text())
        prompt = ByteTokenizer().encode(case["prompt"])
        assert prompt == case["prompt_ids"]
        greedy = generate_ids(model, prompt, max_new_tokens=48, T=64, temperature=0)
        assert greedy.tolist() == case["greedy_48"]
        assert ByteTokenizer().decode(greedy) == case["greedy_text"]
        sampled = generate_ids(model, prompt, max_new_tokens=48, T=64, temperature=0.9, top_k=50, generator=seeded())
        assert sampled.tolist() == case["sampled_t0.9_k50_seed42_48"]
        # The published search for stops works on bytes; latin-1 writes each byte as one character.
        stop, kept = StopText([bytes(case["stop_case"]["stop_bytes"]).decode("latin-1")]), ""
        for token_id in greedy.tolist()[len(prompt) :]:
            kept += stop.push(chr(token_id))
        assert stop.found and [*prompt, *kept.encode("latin-1")] == case["stop_case"]["ids"]
