"""The native decoder against the model in PyTorch: logits, cache, statistics, batches, threads, and its refusals."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niels_gpt.config import NEW, V1, V2, Architecture
from niels_gpt.infer.cache import KVCache, cache_for
from niels_gpt.infer.engine import Engine, ragged_step
from niels_gpt.infer.native.decoder import MAIN, NativeDecoder, _declared, decoder_for
from niels_gpt.infer.steps import stream_steps
from niels_gpt.model.gpt import GPT
from niels_gpt.native import build
from tests.test_generate import GREEDY
from tests.varied import random_ids, varied_model

ARCHITECTURES = [pytest.param(V1, id="v1"), pytest.param(V2, id="v2"), pytest.param(NEW, id="new")]
SHAPES = [  # sizes that fill vectors and panels, and sizes that do not
    pytest.param({}, id="small"),
    pytest.param({"V": 77, "C": 40, "H": 2}, id="odd"),
    pytest.param({"V": 130, "C": 128, "H": 2}, id="aligned"),
    pytest.param({"V": 9, "C": 2, "H": 1, "L": 1}, id="tiny"),
]
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
pytestmark = needs_compiler


def made(found: NativeDecoder | str) -> NativeDecoder:
    assert isinstance(found, NativeDecoder), found
    return found


def decode(decoder: NativeDecoder, ids: list[int], cache: KVCache, row: int = 0) -> Tensor:
    return torch.stack([decoder.step([token], [t], cache, [row]).logits[0] for t, token in enumerate(ids)])


@torch.no_grad()
def full_logits(model: GPT, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]))[0]


class TestParity:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("threads", [1, 5])
    def test_every_position_has_the_models_logits(
        self, arch: Architecture, shape: dict[str, int], threads: int
    ) -> None:
        model = varied_model(arch, **shape)
        if model.cfg.C > 40:  # as wide as this its matrices make the last bits of float32 grow to more than is asked
            with torch.no_grad():
                for parameter in model.blocks.parameters():
                    parameter.mul_(0.4 if parameter.ndim == 2 else 1)
        ids, cache = random_ids(32, model.cfg.V), cache_for(model, B=1, T_max=32)
        logits = decode(NativeDecoder(model, "fp32", threads), ids, cache)
        torch.testing.assert_close(logits, full_logits(model, ids), atol=1e-4, rtol=0)
        expected = cache_for(model, B=1, T_max=32)
        with torch.no_grad():
            model(torch.tensor([ids]), cache=expected)
        torch.testing.assert_close(cache.k, expected.k, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(cache.v, expected.v, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_statistics_are_those_of_the_logits(self, arch: Architecture) -> None:
        model = varied_model(arch, V=130)
        found = made(decoder_for(model)).step([7], [0], cache_for(model, B=1, T_max=4), [0])
        logp = found.logits.log_softmax(-1)
        torch.testing.assert_close(found.logsumexp, found.logits.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize(("weights", "error"), [("fp16", 5e-4), ("int8", 1e-2)])
    def test_packed_weights_are_the_rounded_ones(self, arch: Architecture, weights: str, error: float) -> None:
        """The decoder against PyTorch with the same rounding: what is left is the order of additions."""
        model, rounded = varied_model(arch, C=64), varied_model(arch, C=64)
        with torch.no_grad():
            for name, parameter in rounded.named_parameters():
                if parameter.ndim == 2 and not name.startswith("tok_emb"):
                    parameter.copy_(as_stored(parameter, weights))
            rounded.lm_head = torch.nn.Linear(64, 61, bias=False)  # the embedding itself stays float32
            rounded.lm_head.weight.copy_(as_stored(model.tok_emb.weight, weights))
        ids = random_ids(20, 61)
        logits = decode(NativeDecoder(model, weights), ids, cache_for(model, B=1, T_max=32))
        torch.testing.assert_close(logits, full_logits(rounded, ids), atol=error, rtol=0)
        assert (logits - full_logits(model, ids)).abs().max() > 1e-4  # it is not the float32 path

    def test_an_untied_head_is_used(self) -> None:
        model = varied_model()
        model.lm_head = torch.nn.Linear(24, 61, bias=False)
        ids = random_ids(5, 61)
        logits = decode(made(decoder_for(model)), ids, cache_for(model, B=1, T_max=8))
        torch.testing.assert_close(logits, full_logits(model, ids), atol=1e-4, rtol=0)

    def test_nan_weights_give_nan_entropy(self) -> None:
        model = varied_model()
        with torch.no_grad():
            model.ln_f.weight[3] = torch.nan
        found = made(decoder_for(model)).step([1], [0], cache_for(model, B=1, T_max=4), [0])
        assert found.entropy.isnan().all()

    def test_infinitely_large_activations_stay_visible(self) -> None:
        model = varied_model()
        with torch.no_grad():
            model.tok_emb.weight[1] = torch.inf
        for weights in ("fp32", "int8"):
            found = NativeDecoder(model, weights).step([1], [0], cache_for(model, B=1, T_max=4), [0])
            assert not found.entropy.isfinite().all()


def as_stored(weight: Tensor, weights: str) -> Tensor:
    """The values that a matrix has after packing."""
    if weights == "fp16":
        return weight.half().float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


class TestBatch:
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
    def test_a_row_has_the_same_bits_alone_and_in_company(self, arch: Architecture, weights: str) -> None:
        model, B = varied_model(arch, C=40), 7
        decoder, cache = NativeDecoder(model, weights), cache_for(model, B=9, T_max=32)
        texts = [random_ids(32, 61, seed=i) for i in range(B)]
        rows, starts = [8, 0, 3, 4, 1, 7, 5], [0, 3, 9, 1, 0, 15, 2]
        for text, row, start in zip(texts, rows, starts, strict=True):
            decode(decoder, text[:start], cache, row) if start else None
        together = []
        for t in range(12):
            tokens = [text[start + t] for text, start in zip(texts, starts, strict=True)]
            together.append(decoder.step(tokens, [start + t for start in starts], cache, rows).logits)
        for i, (text, start) in enumerate(zip(texts, starts, strict=True)):
            alone = decode(decoder, text[: start + 12], cache_for(model, B=1, T_max=32))[start:]
            assert torch.equal(torch.stack([logits[i] for logits in together]), alone)
        assert not cache.k[:, [2, 6]].any()  # rows that nobody named

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_the_pytorch_step_for_ragged_rows_agrees(self, arch: Architecture) -> None:
        model = varied_model(arch)
        decoder = made(decoder_for(model))
        native, plain = cache_for(model, B=3, T_max=16), cache_for(model, B=3, T_max=16)
        decode(decoder, [5, 6, 7], native, 1)
        plain.k.copy_(native.k), plain.v.copy_(native.v)
        live = torch.tensor([True, True, False])
        with torch.no_grad():
            logits = ragged_step(
                model, torch.tensor([9, 8, 0]), torch.tensor([0, 3, 0]), live, plain.k, plain.v, upto=4
            )
        found = decoder.step([9, 8], [0, 3], native, [0, 1])
        torch.testing.assert_close(logits[:2], found.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(plain.k, native.k, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain.v, native.v, atol=1e-5, rtol=1e-5)

    def test_streams_of_several_threads_take_turns(self) -> None:
        model = varied_model()
        prompts = [random_ids(4, 61, seed=i) for i in range(4)]
        expected = [[s.token_id for s in stream_steps(model, p, max_new_tokens=20, sampling=GREEDY)] for p in prompts]
        decoder, found = made(decoder_for(model)), dict[int, list[int]]()

        def write(i: int) -> None:
            cache, ids = cache_for(model, B=1, T_max=32), list(prompts[i])
            for t in range(23):
                logits = decoder.step([ids[t]], [t], cache, [0]).logits[0]
                if t == len(ids) - 1:
                    ids.append(int(logits.argmax()))
            found[i] = ids[4:]

        threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(4)] == expected


class TestKept:
    def test_the_packed_weights_are_kept_until_the_model_changes(self) -> None:
        model = varied_model()
        first = made(decoder_for(model))
        assert decoder_for(model) is first
        ids, cache = random_ids(6, 61), cache_for(model, B=1, T_max=32)
        with torch.no_grad():
            model.blocks[0].mlp.fc_g.weight.mul_(1.5)
        second = made(decoder_for(model))
        assert second is not first
        torch.testing.assert_close(decode(second, ids, cache), full_logits(model, ids), atol=1e-4, rtol=0)
        model.blocks[1].attn.proj.weight.data.mul_(-1)  # uncounted by PyTorch
        third = made(decoder_for(model))
        assert third is not second
        torch.testing.assert_close(decode(third, ids, cache), full_logits(model, ids), atol=1e-4, rtol=0)

    def test_an_optimizer_step_counts(self) -> None:
        model = varied_model().train()
        first = made(decoder_for(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
        optimizer.step()
        assert decoder_for(model) is not first

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_makes_its_own(self) -> None:
        model = varied_model()
        decoder = NativeDecoder(model, threads=3)
        child = os.fork()
        if child == 0:  # only the native code, and no way back into pytest
            os._exit(0 if not decoder.usable and decode_one(NativeDecoder(model, threads=3), model) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert decoder.usable and decode_one(decoder, model)


def decode_one(decoder: NativeDecoder, model: GPT) -> bool:
    return bool(decoder.step([1], [0], cache_for(model, B=1, T_max=4), [0]).entropy.isfinite().all())


class TestRefusals:
    def test_what_it_cannot_do_is_said(self) -> None:
        assert decoder_for(varied_model().double()) == "the model is not in float32"
        watched = varied_model()
        watched.blocks[0].register_forward_hook(lambda *_: None)
        assert "watches" in str(decoder_for(watched))
        wide = varied_model()
        with torch.no_grad():
            wide.blocks[0].attn.proj.weight[0, 0] = 1e6
        assert "too large for float16" in str(decoder_for(wide, "fp16"))

    def test_other_weights_without_it_are_a_warning(self) -> None:
        model = varied_model()
        with pytest.warns(UserWarning, match="stay float32, not int8: the native decoder is switched off"):
            Engine(model, rows=1, T_max=8, weights="int8", native=False).refresh()


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not tried yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PLAIN_FLAGS", ("-O0", *build.PLAIN_FLAGS[1:]))
    build.load.cache_clear()
    yield tmp_path / "niels-gpt"
    build.load.cache_clear()


def check_parity() -> None:
    """Every kind of weights with the library that is loaded now, against PyTorch."""
    model, ids = varied_model(C=40), random_ids(20, 61)
    for weights, error in (("fp32", 1e-4), ("fp16", 0.05), ("int8", 1.5)):
        logits = decode(NativeDecoder(model, weights, 2), ids, cache_for(model, B=1, T_max=32))
        torch.testing.assert_close(logits, full_logits(model, ids), atol=error, rtol=0)
        assert (logits.argmax(-1) == full_logits(model, ids).argmax(-1)).float().mean() > 0.8


class TestBuild:
    def test_a_build_for_any_processor_is_right_and_used_again(
        self, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if platform.machine() == "x86_64":
            monkeypatch.setattr(build, "NATIVE", "-march=x86-64")  # neither AVX nor F16C
        check_parity()
        (library,) = fresh_build.glob("*.so")
        build.load.cache_clear()
        monkeypatch.setattr(build, "compiler", lambda: pytest.fail("built again"))
        assert isinstance(build.load(MAIN, _declared), ctypes.CDLL)
        assert [p.suffix for p in sorted(fresh_build.iterdir())] in ([".lock", ".so"], [".so"]) and library.is_file()

    def test_without_a_compiler_pytorch_decodes(self, fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, prompt = varied_model(), random_ids(4, 61)
        expected = [s.token_id for s in stream_steps(model, prompt, max_new_tokens=20, sampling=GREEDY, native=False)]
        monkeypatch.setattr(build, "compiler", lambda: None)
        assert "no C++ compiler" in str(decoder_for(varied_model(seed=2)))
        ids = [s.token_id for s in stream_steps(model, prompt, max_new_tokens=20, sampling=GREEDY)]
        assert ids == expected and len(set(ids)) > 5

    def test_a_failing_compiler_is_quoted_and_leaves_nothing(self, fresh_build: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(build, "PLAIN_FLAGS", ("--no-such-flag",))
        assert "no-such-flag" in str(build.load(MAIN, _declared))
        assert not list(fresh_build.glob("*.so*"))

    def test_a_folder_that_cannot_be_written_does_not_stop_it(
        self, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fresh_build.parent.joinpath("file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_build.parent / "file"))
        monkeypatch.setattr(tempfile, "tempdir", str(fresh_build.parent))
        at_the_end: list[Callable[[], object]] = []
        monkeypatch.setattr(atexit, "register", lambda f, *a, **k: at_the_end.append(functools.partial(f, *a, **k)))
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            monkeypatch.setattr(build, "NATIVE", "-march=haswell")  # AVX2 without AVX512
        check_parity()
        assert list(fresh_build.parent.glob("niels-gpt-*/*.so"))
        for leave in at_the_end:
            leave()
        assert [p.name for p in fresh_build.parent.iterdir()] == ["file"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_writes_what_a_cpu_writes() -> None:
    model, ids = varied_model(), random_ids(5, 61)
    expected = [s.token_id for s in stream_steps(model, ids, max_new_tokens=60, sampling=GREEDY, native=False)]
    engine = Engine(model.cuda(), rows=3, T_max=32)
    engine.refresh()
    with torch.inference_mode():
        engine.prefill(1, ids, 0)
        engine.step([1, 2], [7, 8], [5, 0])
    assert engine._graph is not None and engine._graph._graph is not None
    assert [s.token_id for s in stream_steps(model, ids, max_new_tokens=60, sampling=GREEDY)] == expected
