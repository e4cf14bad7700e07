"""Causal attention of training rows on CPUs: blocks of queries, each against the keys that it may see.

The blocks above the diagonal are never computed, and the probabilities are kept for the backward pass, where the fused
kernel computes them again: 1.25x faster at 512 positions in float32 (docs/log.md). Memory grows with T^2 / 2, as the
kernel's does not, so that long rows are left to the kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # queries
LONGEST = 512  # positions; from 1024 on the fused kernel is as fast


def blocks_are_faster(q: Tensor, k: Tensor) -> bool:
    """True for a training row that `causal_attention` should take: float32 on a CPU, all of its keys its own."""
    return (
        q.device.type == "cpu"
        and q.dtype is torch.float32
        and q.requires_grad
        and BLOCK < q.shape[2] == k.shape[2] <= LONGEST
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), each query seeing keys up to its own position) v; all (B, H, T, D), no dropout."""
    return _attend(q, k, v)


def stay_eager() -> None:
    """Have `torch.compile` call this attention as it is, in blocks that are compiled from now on.

    Not a decorator: that would load the compiler, seconds of every program's start, for those that never compile.
    """
    global _attend
    _attend = torch.compiler.disable(_in_blocks)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Blocks.apply(q, k, v)


_attend = _in_blocks


class _Blocks(torch.autograd.Function):
    """With S = s q k^T, P = softmax(S), y = P v: dv = P^T g, dS = P (g v^T - sum(g y)), dq = s dS k, dk = s dS^T q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
        y = q.new_empty(B, T, H, D).transpose(1, 2)  # laid out as the projection reads it
        future = torch.full((BLOCK, BLOCK), -math.inf).triu_(1)
        scratch = q.new_empty(())  # what beta = 0 leaves unread
        kept = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            scores = torch.baddbmm(scratch, q[:, start:end], k[:, :end].mT, beta=0, alpha=D**-0.5)
            scores[:, :, start:].add_(future[: end - start, : end - start])
            probs = scores.softmax(dim=-1)  # (B * H, end - start, end)
            y[:, :, start:end] = (probs @ v[:, :end]).view(B, H, end - start, D)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        B, H, T, D = y.shape
        g_dot_y = (grad * y).sum(dim=-1, keepdim=True).view(B * H, T, 1)
        grad = grad.reshape(B * H, T, D)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scratch = q.new_empty(())
        for start, probs in zip(range(0, T, BLOCK), kept, strict=True):
            end = min(start + BLOCK, T)
            rows = slice(start, end)
            dv[:, :end].baddbmm_(probs.mT, grad[:, rows])
            d_scores = (grad[:, rows] @ v[:, :end].mT).sub_(g_dot_y[:, rows]).mul_(probs)
            dq[:, rows] = torch.baddbmm(scratch, d_scores, k[:, :end], beta=0, alpha=D**-0.5)
            dk[:, :end].baddbmm_(d_scores.mT, q[:, rows], alpha=D**-0.5)
        return dq.view(B, H, T, D), dk.view(B, H, T, D), dv.view(B, H, T, D)
