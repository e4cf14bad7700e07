"""Rotary embeddings: tables, interleaved pairs, and the complex-number path against the real formula."""

import numpy as np
import pytest
import torch

from niels_gpt.model.rope import apply_rope, rope_cache, rotate
from tests.model.plain_forward import turn
from tests.reference import BUNDLE, needs_bundle


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def real_formula(x, sin, cos):
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.empty_like(x)
    turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return turned


@needs_bundle
def test_published_tables_and_rotation():
    vectors = BUNDLE / "v2/vectors"
    sin, cos = rope_cache(64, 12, theta=10000.0)
    np.testing.assert_allclose(sin.numpy(), np.load(vectors / "rope_sin_64x12.npy"), atol=1e-7)
    np.testing.assert_allclose(cos.numpy(), np.load(vectors / "rope_cos_64x12.npy"), atol=1e-7)
    example = {name: torch.from_numpy(array) for name, array in np.load(vectors / "apply_rope.npz").items()}
    q, k = apply_rope(example["q"], example["k"], sin, cos)
    torch.testing.assert_close(q, example["q_rot"], atol=1e-6, rtol=0)
    torch.testing.assert_close(k, example["k_rot"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("T", "D", "theta"), [(7, 2, 10000.0), (40, 12, 10000.0), (300, 8, 500.0)])
def test_tables(T, D, theta):
    sin, cos = rope_cache(T, D, theta=theta)
    assert sin.shape == cos.shape == (1, 1, T, D // 2)
    assert sin.dtype == torch.float32
    angle = np.arange(T)[:, None] * theta ** (-2 * np.arange(D // 2) / D)
    np.testing.assert_allclose(sin[0, 0].numpy(), np.sin(angle), atol=1e-7)
    np.testing.assert_allclose(cos[0, 0].numpy(), np.cos(angle), atol=1e-7)


def test_pairs_are_interleaved():
    q, k = normal(2, 3, 9, 8), normal(2, 3, 9, 8, seed=1)
    turned = apply_rope(q, k, *rope_cache(20, 8, theta=10000.0))
    torch.testing.assert_close(turned[0], turn(q, 10000.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[1], turn(k, 10000.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_path_equals_the_real_formula_in_value_and_gradient(dtype):
    sin, cos = rope_cache(16, 8, theta=10000.0)
    x, upstream = normal(2, 3, 16, 8, dtype=dtype), normal(2, 3, 16, 8, seed=1, dtype=dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().float().requires_grad_()
    out, expected = rotate(ours, sin, cos), real_formula(plain, sin, cos)
    assert out.dtype == dtype
    out.backward(upstream)
    expected.backward(upstream.float())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours.grad.float(), plain.grad, atol=tolerance, rtol=0)


def test_strided_input_as_attention_hands_it_over():
    sin, cos = rope_cache(6, 4, theta=10000.0)
    x = normal(2, 6, 3, 5, 4).transpose(1, 3).unbind(2)[1]  # a slice of a fused q/k/v product
    assert not x.is_contiguous()
    torch.testing.assert_close(rotate(x, sin, cos), real_formula(x.contiguous(), sin, cos))


def test_scores_depend_on_distance_only():
    sin, cos = rope_cache(32, 8, theta=10000.0)
    q, k = (normal(1, 1, 1, 8, seed=s).expand(1, 1, 32, 8).contiguous() for s in (0, 1))
    turned_q, turned_k = apply_rope(q, k, sin, cos)
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in (0, 3, 10):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)


def test_what_apply_rope_refuses():
    sin, cos = rope_cache(8, 4, theta=10000.0)
    q = normal(1, 1, 8, 4)
    bad = [
        (normal(1, 1, 8, 3), normal(1, 1, 8, 3), sin, cos),  # odd head size
        (q, normal(1, 2, 8, 4), sin, cos),
        (q, q.double(), sin, cos),
        (normal(1, 1, 9, 4), normal(1, 1, 9, 4), sin, cos),  # table too short
        (normal(1, 1, 8, 6), normal(1, 1, 8, 6), sin, cos),  # table of another head size
    ]
    for arguments in bad:
        with pytest.raises(AssertionError):
            apply_rope(*arguments)
    with pytest.raises(AssertionError):
        rope_cache(8, 5, theta=10000.0)
