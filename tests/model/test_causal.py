"""Attention in blocks of queries against PyTorch's own, in value and gradients; and when it is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.config import NEW, ModelConfig
from niels_gpt.model import blocks, causal
from niels_gpt.model.causal import BLOCK, LONGEST, blocks_are_faster, causal_attention
from niels_gpt.model.gpt import GPT
from niels_gpt.model.native import ops as native

WIDE = ModelConfig(V=61, T=LONGEST, C=16, L=2, H=2, d_ff=24, dropout=0.0, rope_theta=10000.0)


def heads(T: int, *, H: int = 3, D: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as attention has them: slices of one fused product, (2, H, T, D)."""
    generator = torch.Generator().manual_seed(T)
    fused = torch.randn(2, T, 3, H, D, generator=generator, dtype=torch.float64).to(dtype)
    return [part.requires_grad_() for part in fused.transpose(1, 3).unbind(2)]


@pytest.mark.parametrize("T", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 17])
def test_equals_the_fused_kernel_in_value_and_gradients(T: int) -> None:
    q, k, v = heads(T, dtype=torch.float64)
    ours, theirs = causal_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_output_needs_no_copy_before_the_projection() -> None:
    y = causal_attention(*heads(BLOCK + 3))
    assert y.transpose(1, 2).is_contiguous()


def test_large_scores_stay_finite() -> None:
    q, k, v = heads(BLOCK + 9)
    y = causal_attention(q * 1e4, k * 1e4, v)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_when_it_is_taken() -> None:
    q, k, _ = heads(BLOCK + 1)
    assert blocks_are_faster(q, k)
    assert not blocks_are_faster(q.detach(), k)  # nothing to train
    assert not blocks_are_faster(q[:, :, :1], k)  # decoding
    assert not blocks_are_faster(q.bfloat16(), k.bfloat16())
    assert not blocks_are_faster(*heads(BLOCK)[:2])
    assert blocks_are_faster(*heads(LONGEST)[:2])
    assert not blocks_are_faster(*heads(LONGEST + 1)[:2])


COMPILED = pytest.param("inductor", 2, marks=pytest.mark.soak)
TRACED = ("aot_eager", 1)  # every block is traced anew, for seconds


@pytest.mark.parametrize(("backend", "L"), [(None, 2), TRACED, COMPILED], ids=["plain", "traced", "compiled"])
def test_a_model_trains_the_same_with_and_without(backend: str | None, L: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = replace(WIDE, L=L)
    x = torch.randint(WIDE.V, (2, BLOCK + 6), generator=torch.Generator().manual_seed(0))
    taken: list[int] = []

    def recording(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append(q.shape[2])
        return causal_attention(q, k, v)

    monkeypatch.setattr(native, "_wanted", False)  # compiled code comes first where there is a compiler
    results = []
    for ours in (True, False):
        monkeypatch.setattr(blocks, "causal_attention", torch.compiler.disable(recording))
        monkeypatch.setattr(blocks, "blocks_are_faster", causal.blocks_are_faster if ours else lambda q, k: False)
        torch.manual_seed(3)
        model = GPT(cfg, NEW)
        if backend is not None and ours:
            model.compile_blocks(backend)
        loss = model(x, x)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert taken == [BLOCK + 6] * L
    (one, grads), (other, expected) = results
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
