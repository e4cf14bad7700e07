"""Losses as sums over counts, and bits per byte."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.batching import Batch, TokenStream
from niels_gpt.device import choose_precision
from niels_gpt.eval import (
    bits_per_byte,
    byte_unigram_bits,
    eval_loss_on_stream,
    evaluate,
    held_out_bits,
    token_byte_lengths,
)
from niels_gpt.infer.steps import eval_mode
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import validate_overrides
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.reference import BUNDLE, needs_bundle
from tests.varied import random_ids, varied_model


def rows(V: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.tensor(random_ids(math.prod(shape), V, seed)).view(shape)


def test_tokens_count_alike_whatever_the_batches() -> None:
    model = varied_model()
    x, y = rows(61, 6, 16), rows(61, 6, 16, seed=2)
    y[0, 3:] = IGNORED  # one row with three targets
    whole = evaluate(model, [Batch(x, y)], device="cpu")
    parts = evaluate(model, [Batch(x[:1], y[:1]), Batch(x[1:], y[1:])], device="cpu")
    assert whole.tokens == parts.tokens == 6 * 16 - 13
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    logits = model(x).log_softmax(-1).flatten(0, 1)
    expected = -sum(logits[i, t].item() for i, t in enumerate(y.flatten().tolist()) if t != IGNORED) / whole.tokens
    assert whole.loss == pytest.approx(expected, rel=1e-5)


def test_batches_without_a_target_count_nothing() -> None:
    model = varied_model()
    x = rows(61, 2, 8)
    nothing = Batch(x, torch.full_like(x, IGNORED))
    assert math.isnan(evaluate(model, [nothing], device="cpu").loss)
    one, both = (evaluate(model, batches, device="cpu") for batches in ([Batch(x, x)], [nothing, Batch(x, x)]))
    assert one.loss == both.loss


def test_the_mode_comes_back_even_after_an_error() -> None:
    model = varied_model(V=256).train()
    stream = bytes(range(200))
    eval_loss_on_stream(model, stream=stream, B=2, T=8, device="cpu", eval_steps=2, seed=1)
    assert model.training
    with pytest.raises(AssertionError):
        eval_loss_on_stream(model, stream=stream, B=2, T=64, device="cpu", eval_steps=2, seed=1)
    assert model.training


def test_evaluating_leaves_the_global_generator_alone() -> None:
    model = varied_model(V=256).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    eval_loss_on_stream(model, stream=bytes(range(200)), B=2, T=8, device="cpu", eval_steps=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_uniform_model_has_eight_bits_per_byte_on_bytes() -> None:
    model = varied_model(V=256)
    torch.nn.init.zeros_(model.tok_emb.weight)
    stream = TokenStream([np.frombuffer(bytes(random_ids(1000, 256)), np.uint8)], "bytes")
    result = bits_per_byte(model, stream, ByteTokenizer(), B=4, device="cpu")
    assert result.value == pytest.approx(8.0, rel=1e-6)
    assert result.text_bytes == 31 * 32  # every whole window of T=32; the first byte is never predicted


def test_specials_are_left_out_of_nats_and_bytes(tiny_tokenizer: SentencePieceTokenizer) -> None:
    model = varied_model(V=tiny_tokenizer.vocab_size)
    ids = tiny_tokenizer.encode("What is your name? My name is niels. How much is 3 plus 4? " * 3)
    plain = TokenStream([np.array(ids[:33], np.uint16)], "plain")
    result = bits_per_byte(model, plain, tiny_tokenizer, B=1, device="cpu")
    assert result.text_bytes == len(tiny_tokenizer.decode(ids[1:33]).encode())
    eot = tiny_tokenizer.eot_id
    assert eot is not None and token_byte_lengths(tiny_tokenizer)[eot] == 0
    marked = TokenStream([np.array([*ids[:32], eot], np.uint16)], "marked")
    shorter = bits_per_byte(model, marked, tiny_tokenizer, B=1, device="cpu")
    assert shorter.text_bytes == len(tiny_tokenizer.decode(ids[1:32]).encode()) and shorter.nats < result.nats


def test_one_evaluation_gives_the_loss_and_the_bits_of_its_text(tiny_tokenizer: SentencePieceTokenizer) -> None:
    """The bits per byte beside a loss are those of the same targets without sentinels; the loss is as without them."""
    model = varied_model(V=tiny_tokenizer.vocab_size)
    assert tiny_tokenizer.eot_id is not None
    x, y = rows(512, 4, 16), rows(512, 4, 16, seed=2)
    y[0, :5], y[1, 3], y[2, 7:9] = IGNORED, tiny_tokenizer.eot_id, tiny_tokenizer.eot_id
    lengths = token_byte_lengths(tiny_tokenizer)
    found = evaluate(model, [Batch(x, y), Batch(x[:1], y[:1])], device="cpu", byte_lengths=lengths)
    plain = evaluate(model, [Batch(x, y), Batch(x[:1], y[:1])], device="cpu")
    assert (found.nats, found.tokens) == (plain.nats, plain.tokens) and math.isnan(plain.text.value)
    text = y.masked_fill(torch.from_numpy(lengths)[y.clamp_min(0)] == 0, IGNORED)
    alone = evaluate(model, [Batch(x, text), Batch(x[:1], text[:1])], device="cpu")
    assert alone.tokens < plain.tokens and found.text.nats == pytest.approx(alone.nats, rel=1e-6)
    assert found.text.text_bytes == sum(
        len(tiny_tokenizer.token_bytes(t)) for part in (y, y[:1]) for t in part.flatten().tolist() if t != IGNORED
    )


def test_batch_size_does_not_matter_and_windows_are_spread(tiny_tokenizer: SentencePieceTokenizer) -> None:
    model = varied_model(V=tiny_tokenizer.vocab_size)
    stream = TokenStream([np.array(random_ids(700, 512), np.uint16), np.array(random_ids(300, 512), np.uint16)], "s")
    one, many = (bits_per_byte(model, stream, tiny_tokenizer, B=B, device="cpu") for B in (1, 7))
    assert one.text_bytes == many.text_bytes and one.value == pytest.approx(many.value, rel=1e-6)
    some = bits_per_byte(model, stream, tiny_tokenizer, B=7, device="cpu", max_windows=5)
    assert 0 < some.text_bytes < one.text_bytes


def test_held_out_text_is_measured_in_the_precision_of_pretraining(tiny_tokenizer: SentencePieceTokenizer) -> None:
    model = varied_model(V=tiny_tokenizer.vocab_size)
    stream = TokenStream([np.array(random_ids(300, 512), np.uint16)], "s")
    found = {}
    for amp in (False, True):
        settings = validate_overrides({"training": {"pretrain": {"amp": amp, "amp_dtype": "bf16"}}})
        precision = choose_precision("cpu", amp, "bf16")
        expected = bits_per_byte(model, stream, tiny_tokenizer, B=32, device="cpu", precision=precision, max_windows=5)
        found[amp] = held_out_bits(model, stream, tiny_tokenizer, settings, max_windows=5)
        assert found[amp] == expected
    assert found[False] != found[True]


def test_byte_unigram_baseline() -> None:
    assert byte_unigram_bits([b"ab" * 5000], [b"ab" * 10]) == pytest.approx(1.0, abs=0.05)
    assert byte_unigram_bits([], [bytes(range(256))]) == pytest.approx(8.0)


@needs_bundle
@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_published_stream_loss(generation: str) -> None:
    name, record = {
        "v1": ("v1/best_with_opt.pt", "v1/eval.json"),
        "v2": ("v2/checkpoint/lib_no_opt.pt", "v2/batches/eval_loss_on_stream.json"),
    }[generation]
    model = ckpt.build_model(ckpt.load_checkpoint(BUNDLE / name, device="cpu"))
    expected = json.loads((BUNDLE / record).read_text())
    stream = (BUNDLE / "v2/batches/stream_wiki.bin").read_bytes()
    arguments = {key: expected[key] for key in ("B", "T", "eval_steps", "seed") if key in expected}
    assert set(arguments) == {"B", "T", "eval_steps", "seed"}, expected
    value = eval_loss_on_stream(model, stream=stream, device="cpu", **arguments)
    recorded = next(expected[key] for key in ("loss", "value", "eval_loss") if key in expected)
    assert value == pytest.approx(recorded, abs=1e-5)


def test_blocks_compiled_for_training_stay_out_of_evaluation() -> None:
    """Every shape of an evaluation or a prompt would be compiled anew."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(len(inputs))
        return graph.forward

    model = varied_model()
    model.compile_blocks(backend=backend)  # type: ignore[arg-type]
    ids = torch.arange(5)[None]
    with eval_mode(model), torch.no_grad():
        model(ids)
    assert not compiled
    model.train()(ids)
    assert compiled
