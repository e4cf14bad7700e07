"""Cross-entropy of a tied head without ever holding all logits at once.

Rows are taken a chunk at a time and the gradients are computed on the way forward, so memory is (chunk, V) and the
logits are read while they are still in cache. Same idea as Liger-Kernel's fused linear cross-entropy and Apple's
CCE (Wijmans et al. 2024), here in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CHUNK_ROWS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(h) if needs_grad else None
        grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        w = weight.to(h.dtype)
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            valid = (target[rows] != IGNORED)[:, None]  # (N, 1)
            index = target[rows].clamp_min(0)
            logits = h[rows] @ w.t()
            top = logits.amax(dim=1, keepdim=True)
            picked = logits.gather(1, index[:, None]).float()
            e = logits.sub_(top).exp_()  # in place: softmax = e / Z, and 1 / Z is left to the small matrices below
            Z = e.sum(dim=1, keepdim=True, dtype=torch.float32)
            total += ((Z.log() + top - picked) * valid).sum()
            if grad_h is None or grad_w is None:
                continue
            # d loss / d logits = softmax - one-hot, zero in ignored rows
            scale = valid / Z
            grad_h[rows] = (e @ w) * scale - w[index] * valid
            grad_w += e.t() @ (h[rows] * scale).to(h.dtype)
            grad_w.index_put_((index,), -(h[rows] * valid).float(), accumulate=True)
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_w * grad, None, None


def cross_entropy_sum(h: Tensor, weight: Tensor, target: Tensor, chunk: int = CHUNK_ROWS) -> Tensor:
    """Sum over rows of -log softmax(h @ weight.T)[target], in nats, as a 0-d float32 tensor.

    h (N, C), weight (V, C), target (N,) int64 with -100 for rows that do not count. Computed in h's dtype (or
    autocast's) with float32 sums; the gradient of `weight` is float32.
    """
    if h.device.type == "cpu":  # elsewhere, counting the rows would make the device wait
        counted = (target != IGNORED).nonzero()[:, 0]
        if len(counted) < len(target):  # fine-tuning: prompts and padding need no logits
            h, target = h.index_select(0, counted), target[counted]
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    with torch.autocast(h.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(h, weight, target, chunk)
