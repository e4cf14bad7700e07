"""Fresh files of both published generations, of several sizes and seeds: what the loaded model computes and says.

The files come from the compatibility sheet alone (`published`), what they must give from its equations written down a
second time (`tests.model.plain_forward`).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from niels_gpt.chat import Conversation, build_options
from niels_gpt.chat_format import TextChat, TokenChat
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.infer.cache import cache_for
from niels_gpt.infer.kv_cache import decode_step, generate_ids_greedy_cached, generate_ids_greedy_full, prefill
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import stream_steps
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.checkpoint.published import V1_SHAPES, V2_SHAPES, Shape, checkpoint_bytes, state_dict
from tests.model.plain_forward import plain_forward

CASES = [("v1", shape, seed) for shape in V1_SHAPES for seed in (0, 1)]
CASES += [("v2", shape, seed) for shape in V2_SHAPES for seed in (0, 1)]
NEW_TOKENS = 12
pytestmark = pytest.mark.parametrize(("generation", "shape", "seed"), CASES)


@pytest.fixture
def loaded(
    generation: str, shape: Shape, seed: int, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> LoadedModel:
    path = tmp_path / "best.pt"
    path.write_bytes(checkpoint_bytes(generation, shape, seed, tokenizer_sha256=tiny_tokenizer.sha256))
    return load_model(path, device="cpu", tokenizer_path=None if generation == "v1" else tiny_tokenizer.model_path)


def ids_of(shape: Shape, seed: int, length: int) -> torch.Tensor:
    return torch.randint(shape.V, (1, length), generator=torch.Generator().manual_seed(seed + 50))


def reference(generation: str, shape: Shape, seed: int, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and attention by the sheet's equations, in double precision."""
    state = {name: tensor.double() for name, tensor in state_dict(generation, shape, seed).items()}
    return plain_forward(state, ids, L=shape.L, H=shape.H, theta=shape.rope_theta)


def test_logits_at_every_position_of_a_full_context(
    loaded: LoadedModel, generation: str, shape: Shape, seed: int
) -> None:
    ids = ids_of(shape, seed, shape.T)
    expected = reference(generation, shape, seed, ids)[0]
    with torch.no_grad():
        found = loaded.model(ids)
    assert expected.std() > 0.5 and len(set(expected.argmax(-1)[0].tolist())) > 3  # an output that varies
    assert float((found - expected).abs().max()) < 1e-4
    assert loaded.step == 1000 and loaded.model.cfg.rope_theta == shape.rope_theta
    assert isinstance(loaded.chat_format, TextChat if generation == "v1" else TokenChat)


def test_greedy_ids_of_every_generator(loaded: LoadedModel, generation: str, shape: Shape, seed: int) -> None:
    prompt = ids_of(shape, seed, shape.T - NEW_TOKENS)[0].tolist()
    expected = list(prompt)
    for _ in range(NEW_TOKENS):
        expected.append(int(reference(generation, shape, seed, torch.tensor([expected]))[0][0, -1].argmax()))
    for generate in (generate_ids_greedy_full, generate_ids_greedy_cached):
        assert generate(loaded.model, torch.tensor(prompt), max_new_tokens=NEW_TOKENS, eot_token_id=-1) == expected
    for use_cache in (True, False):
        steps = stream_steps(
            loaded.model, prompt, max_new_tokens=NEW_TOKENS, sampling=Sampling(0.0), use_cache=use_cache
        )
        assert [step.token_id for step in steps] == expected[len(prompt) :]


def test_attention_rows_sum_to_one_and_are_those_of_a_full_pass(
    loaded: LoadedModel, generation: str, shape: Shape, seed: int
) -> None:
    ids = ids_of(shape, seed, shape.T)
    start = shape.T - NEW_TOKENS
    maps = reference(generation, shape, seed, ids)[1]
    for layer, expected in enumerate(maps):
        cache = cache_for(loaded.model, B=1, T_max=shape.T)
        _, cache, trace = prefill(loaded.model, ids[:, :start], cache, trace_layer=layer, return_attn_row=True)
        rows = [trace["attn_row"]]
        for t in range(start, shape.T):
            _, cache, trace = decode_step(
                loaded.model, ids[:, t : t + 1], cache, trace_layer=layer, return_attn_row=True
            )
            rows.append(trace["attn_row"])
        for t, row in zip(range(start - 1, shape.T), rows, strict=True):
            row = torch.as_tensor(row).reshape(shape.H, -1)[:, : t + 1]
            assert torch.allclose(row.sum(-1), torch.ones(shape.H), atol=1e-5)
            assert float((row - expected[0, :, t, : t + 1]).abs().max()) < 1e-5
        steps = list(
            stream_steps(
                loaded.model, ids[0, :start].tolist(), max_new_tokens=2, sampling=Sampling(0.0), trace_layer=layer
            )
        )
        assert steps[0].attn_row is not None
        assert torch.allclose(steps[0].attn_row, expected[0, :, start - 1, :start].float(), atol=1e-5)
        assert torch.allclose(steps[1].attn_row.sum(-1), torch.ones(shape.H), atol=1e-5)


def test_it_chats(loaded: LoadedModel, generation: str, shape: Shape, seed: int) -> None:
    conversation = Conversation(loaded, build_options(None, "", temperature=0.9, seed=seed, max_new_tokens=9))
    text = "".join(span.text for span in conversation.reply("hi"))
    assert len(conversation.reply_steps) <= 9 and "<|ngpt_" not in text
    assert all(math.isfinite(step.logprob) for step in conversation.reply_steps) and conversation.reply_steps
