"""Chunked cross-entropy against PyTorch's own, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from niels_gpt.model import loss
from niels_gpt.model.loss import IGNORED, cross_entropy_sum

N, C, V = 23, 16, 37


def example(dtype: torch.dtype = torch.float32, ignored: int = 6):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    target = torch.randint(V, (N,), generator=generator)
    target[torch.randperm(N, generator=generator)[:ignored]] = IGNORED
    return h, weight, target


def reference(h, weight, target):
    h, weight = (t.detach().float().requires_grad_() for t in (h, weight))
    loss = F.cross_entropy(h @ weight.T, target, ignore_index=IGNORED, reduction="sum")
    (3 * loss).backward()
    return loss.detach(), h.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 24, 512])
@pytest.mark.parametrize("ignored", [0, 6, N])
def test_equals_cross_entropy_for_any_chunk_size(chunk, ignored):
    h, weight, target = example(ignored=ignored)
    loss = cross_entropy_sum(h, weight, target, chunk)
    (3 * loss).backward()
    expected, grad_h, grad_w = reference(h, weight, target)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(h.grad, grad_h, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(weight.grad, grad_w, atol=1e-4, rtol=1e-5)
    assert torch.equal(h.grad[target == IGNORED], torch.zeros_like(h.grad[target == IGNORED]))


def test_gradient_by_finite_differences():
    h, weight, target = example()
    h, weight = (t.detach().double().requires_grad_() for t in (h, weight))
    probe = torch.zeros_like(weight)
    probe[3, 5] = 1.0
    loss = [F.cross_entropy(h @ (weight + s * probe).T, target, reduction="sum") for s in (1e-4, -1e-4)]
    slope = ((loss[0] - loss[1]) / 2e-4).item()
    w = weight.detach().float().requires_grad_()
    cross_entropy_sum(h.detach().float(), w, target).backward()
    assert w.grad[3, 5].item() == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("how", ["bf16 inputs", "autocast"])
def test_bf16_is_close_and_the_weight_gradient_is_float32(how):
    h, weight, target = example(torch.bfloat16 if how == "bf16 inputs" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        loss = cross_entropy_sum(h, weight, target, 8)
    (3 * loss).backward()
    expected, grad_h, grad_w = reference(h, weight, target)
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert h.grad.dtype == h.dtype
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for ours, theirs in ((h.grad.float(), grad_h), (weight.grad, grad_w)):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.995


def test_only_what_is_asked_for_gets_a_gradient():
    h, weight, target = example()
    cross_entropy_sum(h.detach(), weight, target).backward()
    assert h.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not cross_entropy_sum(h, weight, target).requires_grad


def test_no_gradient_means_the_same_value():
    h, weight, target = example()
    with torch.no_grad():
        quiet = cross_entropy_sum(h, weight, target, 4)
    assert torch.equal(quiet, cross_entropy_sum(h, weight, target, 4).detach())


def test_large_logits_do_not_overflow():
    h, weight, target = example()
    loss = cross_entropy_sum(h * 1e4, weight, target)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_very_unlikely_targets_cost_what_they_should(scale):
    """From about 87 nats on, a float32 probability is zero; the loss must not be."""
    h, weight, target = example(ignored=0)
    loss = cross_entropy_sum(h * scale, weight, target)
    grads = torch.autograd.grad(loss, (h, weight))
    expected = F.cross_entropy((h * scale) @ weight.T, target, reduction="sum")
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-6)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (h, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=1e-5)


def test_a_second_backward_pass_is_refused():
    h, weight, target = example()
    loss = cross_entropy_sum(h, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_what_is_held_at_once_is_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most = loss.CHUNK_LOGITS.get(device, loss.CHUNK_LOGITS["cpu"])
    for vocabulary in (256, 4096, 50257):
        rows = loss.rows_at_once(vocabulary, device)
        assert rows * vocabulary <= most < (rows + 1) * vocabulary
    assert loss.rows_at_once(2 * most, device) == 1
    h, weight, target = example()
    whole = cross_entropy_sum(h, weight, target)
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", 5 * V)
    torch.testing.assert_close(cross_entropy_sum(h, weight, target), whole)
