"""Cross-entropy of a tied head without ever holding all logits at once.

Rows are taken a chunk at a time and the gradients are computed on the way forward, so memory is (chunk, V) and the
logits are read while they are still in cache. Same idea as Liger-Kernel's fused linear cross-entropy and Apple's
CCE (Wijmans et al. 2024), here in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from niels_gpt.model.native import ops as native

IGNORED = -100
# Logits held at once, a chunk of rows: fewer chunks are faster, a GPU's step 1.5 times; 64 MiB or 256 are little there.
CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
TINY = 1e-30  # the smallest probability whose logarithm is taken; that of a smaller one could be infinite


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, target: Tensor, chunk: int) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(h) if needs_grad else None
        w = weight.to(h.dtype)
        in_place = h.device.type == "cpu" and w.dtype is torch.float32
        # In place the first chunk's gradient is written, not added: a pass over (V, C) less.
        fresh = torch.empty if in_place and len(h) else torch.zeros
        grad_w = fresh(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        add_rows = _add_rows_in_place if in_place else _add_rows
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            into = None if grad_h is None else grad_h[rows]
            total += add_rows(h[rows], w, target[rows], into, grad_w, first=start == 0)
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        # In place saves a pass; a second backward through the same graph is refused by PyTorch, not silently wrong.
        return grad_h.mul_(grad.to(grad_h.dtype)), grad_w.mul_(grad), None, None


def _add_rows(
    h: Tensor, w: Tensor, target: Tensor, grad_h: Tensor | None, grad_w: Tensor | None, *, first: bool
) -> Tensor:
    """Nats of rows h (N, C), summed; their gradient goes into grad_h and is added to grad_w."""
    valid = (target != IGNORED)[:, None]  # (N, 1)
    index = target.clamp_min(0)
    logits = h @ w.t()
    top = logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, index[:, None]).float()
    e = logits.sub_(top).exp_()  # in place: softmax = e / Z, and 1 / Z is left to the small matrices below
    Z = e.sum(dim=1, keepdim=True, dtype=torch.float32)
    if grad_h is not None and grad_w is not None:
        # d loss / d logits = softmax - one-hot, zero in ignored rows
        scale = valid / Z
        grad_h.copy_((e @ w) * scale - w[index] * valid)
        grad_w += e.t() @ (h * scale).to(h.dtype)
        grad_w.index_put_((index,), -(h * valid).float(), accumulate=True)
    return ((Z.log() + top - picked) * valid).sum()


def _add_rows_in_place(
    h: Tensor, w: Tensor, target: Tensor, grad_h: Tensor | None, grad_w: Tensor | None, *, first: bool
) -> Tensor:
    """The same for float32 on a CPU, where every row counts: the logits become probabilities in place.

    first: grad_w holds nothing yet.
    """
    logits = h @ w.t()
    if native.usable(logits):
        nats = native.cross_entropy_(logits, target)
        if grad_h is not None and grad_w is not None:
            torch.mm(logits, w, out=grad_h)
            grad_w.addmm_(logits.t(), h, beta=0 if first else 1)
        return nats.sum()
    index = target[:, None]
    probs = torch.softmax(logits, dim=1, out=logits)
    picked = probs.gather(1, index)[:, 0]  # (N,)
    nats = -picked.log()
    if (unlikely := (picked < TINY).nonzero()[:, 0]).numel():
        logits = h[unlikely] @ w.t()
        nats[unlikely] = logits.logsumexp(dim=1) - logits.gather(1, index[unlikely])[:, 0]
    if grad_h is not None and grad_w is not None:
        probs.scatter_add_(1, index, probs.new_full(index.shape, -1.0))
        torch.mm(probs, w, out=grad_h)
        grad_w.addmm_(probs.t(), h, beta=0 if first else 1)
    return nats.sum()


def cross_entropy_sum(h: Tensor, weight: Tensor, target: Tensor, chunk: int | None = None) -> Tensor:
    """Sum over rows of -log softmax(h @ weight.T)[target], in nats, as a 0-d float32 tensor.

    h (N, C), weight (V, C), target (N,) int64 with -100 for rows that do not count. Computed in h's dtype (or
    autocast's) with float32 sums, `chunk` rows at a time; the gradient of `weight` is float32.
    """
    if h.device.type == "cpu":  # elsewhere, counting the rows would make the device wait
        counted = (target != IGNORED).nonzero()[:, 0]
        if len(counted) < len(target):  # fine-tuning: prompts and padding need no logits
            h, target = h.index_select(0, counted), target[counted]
    if not torch.is_grad_enabled():  # which a Function cannot know: it would compute gradients that nobody wants
        h, weight = h.detach(), weight.detach()
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    with torch.autocast(h.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(h, weight, target, chunk or rows_at_once(weight.shape[0], h.device.type))


def rows_at_once(V: int, device: str) -> int:
    """How many rows of V logits are held at once."""
    return max(1, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // V)
