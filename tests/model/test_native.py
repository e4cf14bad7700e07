"""Compiled training code against PyTorch: values, gradients, packed rows, threads, what is not finite, and refusals."""

from __future__ import annotations

import copy
import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.config import V2, Architecture, ModelConfig
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.model.gpt import GPT, first_seen, segment_mask
from niels_gpt.model.loss import IGNORED, cross_entropy_sum
from niels_gpt.model.native import ops
from niels_gpt.model.rope import rope_cache
from niels_gpt.native import build
from tests.varied import GENERATIONS, varied_model

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
pytestmark = needs_compiler


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def with_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """f's value and the gradients of all inputs, for a fixed random gradient of the value."""
    y = f(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def assert_equal_to(reference: Callable[..., Tensor], ours: Callable[..., Tensor], *inputs: Tensor) -> None:
    """To 1e-5 of the largest value, against the reference in float64."""
    exact = with_gradients(reference, *(t.detach().double().requires_grad_() for t in inputs))
    for found, expected in zip(with_gradients(ours, *inputs), exact, strict=True):
        size = max(float(expected.abs().max()), 1e-3)  # what should be zero may be rounding
        torch.testing.assert_close(found.double() / size, expected / size, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 17), (3, 7, 64), (41, 33, 130)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(shape[-1], seed=1)
    assert_equal_to(
        lambda x, w: F.rms_norm(x, w.shape, w, NORM_EPS), lambda x, w: ops.rms_norm(x, w, NORM_EPS), x, weight
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 11), (5, 127, 33)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate, value = random(*shape), random(*shape, seed=1)
    with torch.no_grad():
        gate.mul_(20)  # into both tails
    assert_equal_to(lambda g, a: F.silu(g) * a, ops.swiglu, gate, value)


def plain_attention(qkv: Tensor, *norms: Tensor, H: int, segment: Tensor | None = None, theta: float = 100.0) -> Tensor:
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, 3, H, width // (3 * H)).transpose(1, 3).unbind(2)
    sin, cos = rope_cache(T, q.shape[-1], theta=theta, dtype=torch.float64)
    if norms:
        q, k = (F.rms_norm(t, w.shape, w, NORM_EPS) for t, w in zip((q, k), norms, strict=True))
    turned = []
    for t in (q, k):
        even, odd = t[..., ::2], t[..., 1::2]
        turned.append(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2))
    mask = None if segment is None else segment_mask(segment)
    y = F.scaled_dot_product_attention(*turned, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(2)


def our_attention(qkv: Tensor, *norms: Tensor, H: int, segment: Tensor | None = None, theta: float = 100.0) -> Tensor:
    T, D = qkv.shape[1], qkv.shape[2] // (3 * H)
    sin, cos = rope_cache(T, D, theta=theta)
    first = None if segment is None else first_seen(segment, segment_mask(segment))
    return ops.attention(qkv, norms, sin, cos, H, NORM_EPS, first)


@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 2), (2, 31, 3, 6), (1, 32, 1, 16), (2, 33, 2, 64), (1, 150, 2, 80)])
def test_attention(B: int, T: int, H: int, D: int, normed: bool) -> None:
    norms = (random(D, seed=1), random(D, seed=2)) if normed else ()

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: f(*inputs, H=H)

    assert_equal_to(call(plain_attention), call(our_attention), random(B, T, 3 * H * D), *norms)


def test_attention_of_packed_rows() -> None:
    segment = torch.tensor([[0] * 40 + [1] * 1 + [2] * 89, [0] * 100 + [1] * 30, [5] * 130])
    assert_equal_to(
        lambda *inputs: plain_attention(*inputs, H=2, segment=segment),
        lambda *inputs: our_attention(*inputs, H=2, segment=segment),
        *(random(3, 130, 3 * 2 * 8), random(8, seed=1), random(8, seed=2)),
    )


def test_first_seen() -> None:
    segment = torch.tensor([[3, 3, 1, 1, 1, 2]])
    assert first_seen(segment, segment_mask(segment)).tolist() == [[0, 0, 2, 2, 2, 5]]
    in_two_pieces = torch.tensor([[0, 1, 0]])
    assert first_seen(in_two_pieces, segment_mask(in_two_pieces)) is None


def test_attention_with_large_scores_stays_finite() -> None:
    qkv = random(1, 70, 3 * 8)
    with torch.no_grad():
        qkv[..., :16] *= 1e4
    assert all(torch.isfinite(t).all() for t in with_gradients(lambda x: our_attention(x, H=1), qkv))


@pytest.mark.parametrize("N, V", [(1, 1), (1, 2), (7, 61), (130, 997)])
def test_cross_entropy(N: int, V: int) -> None:
    logits = random(N, V).detach() * 5
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none")
    gradient = torch.autograd.grad(expected.sum(), exact)[0]
    nats = ops.cross_entropy_(logits, target)
    torch.testing.assert_close(nats.double(), expected.detach(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, atol=1e-6, rtol=0)


def test_cross_entropy_of_hopeless_targets_is_finite() -> None:
    logits = torch.tensor([[0.0, -300.0, 50.0]])
    assert float(ops.cross_entropy_(logits, torch.tensor([1]))) == pytest.approx(350.0)
    assert logits.tolist() == [[pytest.approx(0, abs=1e-6), -1.0, 1.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    def spoiled(*shape: int) -> Tensor:
        x = random(*shape).detach()
        x.view(-1)[x.numel() // 2] = bad
        return x.requires_grad_()

    def finite(tensors: list[Tensor]) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    assert not finite(with_gradients(lambda x: ops.rms_norm(x, torch.ones(20), NORM_EPS), spoiled(3, 20))[:2])
    assert not finite(with_gradients(ops.swiglu, spoiled(3, 20), random(3, 20)))
    assert not finite(with_gradients(ops.swiglu, random(3, 20), spoiled(3, 20)))
    assert not finite(with_gradients(lambda x: our_attention(x, H=1), spoiled(1, 37, 3 * 8)))
    logits = spoiled(1, 37).detach()
    assert not finite([ops.cross_entropy_(logits, torch.tensor([18]))])
    model = varied_model(dropout=0.0).train()
    with torch.no_grad():
        model.blocks[1].mlp.fc_g.weight[3, 4] = bad
    x = torch.arange(20)[None]
    assert not torch.isfinite(model(x, x))


def gradients(model: GPT, x: Tensor, y: Tensor, segment: Tensor | None, native: bool) -> list[Tensor]:
    ops.switch(native)
    model.zero_grad()
    loss = model(x, y, segment=segment)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("packed", [False, True], ids=["text", "packed"])
@pytest.mark.parametrize("arch", GENERATIONS.values(), ids=GENERATIONS)
def test_a_whole_model(arch: Architecture, packed: bool) -> None:
    model = varied_model(arch, T=80, dropout=0.0).train()
    x = torch.randint(61, (3, 77), generator=torch.Generator().manual_seed(1))
    y = x.roll(-1, dims=1)
    y[1, 30:] = IGNORED
    segment = torch.arange(77).expand(3, -1) // 25 if packed else None
    exact = gradients(copy.deepcopy(model).double(), x, y, segment, native=True)
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        found = gradients(model, x, y, segment, native=True)
        for one, other in zip(found, exact, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5
        again = gradients(model, x, y, segment, native=True)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_compiled_code_is_what_a_training_row_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("rms_norm", "swiglu", "attention", "cross_entropy_"):
        original = getattr(ops, name)

        def recording(*args: object, name: str = name, original: Callable[..., Tensor] = original) -> Tensor:
            taken.append(name)
            return original(*args)

        monkeypatch.setattr(ops, name, recording)
    model, x = varied_model().train(), torch.arange(20)[None]
    model(x, x)
    assert taken == ["rms_norm", "attention", "rms_norm", "swiglu"] * 2 + ["rms_norm", "cross_entropy_"]
    taken.clear()
    segment = torch.tensor([[0, 1] * 10])  # in pieces: only a mask can say it
    model(x, x, segment=segment)
    assert "attention" not in taken
    taken.clear()
    with torch.no_grad():
        model(x)
    assert not taken


@pytest.mark.parametrize("team", [False, True], ids=["PyTorch's threads", "own threads"])
def test_the_same_bits_at_any_number_of_threads(team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if team:
        monkeypatch.setattr(ops, "_REGION", None)
    elif ops._REGION is None:
        pytest.skip("PyTorch does not run on libgomp here")
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(
            [
                *with_gradients(lambda x, w: ops.rms_norm(x, w, NORM_EPS), random(300, 130), random(130, seed=1)),
                *with_gradients(ops.swiglu, random(90, 1000), random(90, 1000, seed=1)),
                *with_gradients(
                    lambda *inputs: our_attention(*inputs, H=2),
                    *(random(3, 70, 48), random(8, seed=1), random(8, seed=2)),
                ),
                ops.cross_entropy_(random(90, 1000).detach(), torch.arange(90)),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_second_backward_gives_the_same() -> None:
    x, w = random(3, 5, 24), random(24, seed=1)
    y = our_attention(ops.swiglu(ops.rms_norm(x, w, NORM_EPS), x), H=1).sum()
    once = torch.autograd.grad(y, (x, w), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(y, (x, w)), strict=True))


def test_when_it_is_not_taken() -> None:
    x = torch.ones(2)
    assert ops.usable(x, torch.nn.Parameter(x))
    assert not ops.usable(x.double()) and not ops.usable(x, x.bfloat16()) and not ops.usable(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ops.usable(x)
    ops.switch(False)
    assert not ops.usable(x)


def test_torch_compile_leaves_it_alone() -> None:
    model = varied_model(L=1, dropout=0.0).train()  # every block is traced anew, for seconds
    x = torch.arange(20)[None]
    expected = gradients(model, x, x, None, native=True)
    model.compile_blocks("aot_eager")
    for one, other in zip(gradients(model, x, x, None, native=True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not tried yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "niels-gpt"
    build.load.cache_clear()


@pytest.mark.parametrize("flaw", ["no compiler", "a compiler that fails"])
def test_without_a_build_pytorch_trains(flaw: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if flaw == "no compiler":
        monkeypatch.setattr(build, "compiler", lambda: None)
    else:
        monkeypatch.setattr(build, "compiler", lambda: shutil.which("false"))
    assert ops.missing() is not None and not ops.usable(torch.ones(1))
    model, x = varied_model(dropout=0.0).train(), torch.arange(20)[None]
    found = gradients(model, x, x, None, native=True)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model, x, x, None, native=False), strict=True))
    assert not list(fresh_build.glob("*.so"))


def test_a_build_for_any_processor_is_right(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NATIVE", "-DPLAIN")  # neither AVX nor FMA
    monkeypatch.setattr(build, "PLAIN_FLAGS", ("-O1", *build.PLAIN_FLAGS[1:]))
    assert isinstance(build.load(ops.MAIN, ops._declared), ctypes.CDLL)
    test_rms_norm((3, 7, 64))
    test_swiglu((3, 7, 11))
    test_attention(2, 33, 2, 12, True)
    test_cross_entropy(7, 61)


def test_a_row_of_one_token_and_no_rows() -> None:
    h, weight = random(5, 8), random(11, 8, seed=1)
    nothing = cross_entropy_sum(h, weight, torch.full((5,), IGNORED))
    nothing.backward()
    assert float(nothing.detach()) == 0 and not h.grad.any() and not weight.grad.any()
    model = GPT(ModelConfig(V=11, T=4, C=8, L=1, H=2, d_ff=6, dropout=0.0, rope_theta=10000.0), V2).train()
    one = torch.tensor([[3]])
    for a, b in zip(gradients(model, one, one, None, True), gradients(model, one, one, None, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
