"""The parts of a GPT block: norms, attention and MLPs of every generation (see `config.Architecture`).

Attention exists once. With a cache it reads what earlier calls stored; a traced call takes the explicit softmax and
records it, a float32 training row on a CPU goes through `native`, a short bf16 one there through the explicit softmax
as well, every other call takes the fused kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niels_gpt.config import Architecture, ModelConfig
from niels_gpt.model.native import ops as native
from niels_gpt.model.rope import apply_rope, rope_cache

if TYPE_CHECKING:
    from niels_gpt.model.gpt import LayerCache, Trace

NORM_EPS = 1e-5
SHORT = 256  # positions


class _FewerPasses(torch.autograd.Function):
    """RMSNorm whose backward is written out: 1.5x faster on CPUs than autograd's, which reads x three times more often.

    With n = x / rms(x): y = n w, dw = sum(g n), dx = (g w - n mean(g w n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        n = x * inverse
        grad_n = grad * n
        minus_mean = (grad_n @ weight).unsqueeze(-1).div_(-x.shape[-1])
        grad_x = torch.addcmul(grad * weight, n, minus_mean).mul_(inverse)
        return grad_x, grad_n.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape and dtype."""
        if torch.is_grad_enabled() and native.usable(x, self.weight):
            return native.rms_norm(x, self.weight, self.eps)
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and torch.is_grad_enabled():
            return _FewerPasses.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Dropout(nn.Module):
    """Zeros with probability `rate` while training, the rest over 1 - rate (Srivastava et al. 2014)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        return native.dropout(x, self.rate) if native.usable(x) else F.dropout(x, self.rate)


def build_norm(arch: Architecture, dim: int) -> nn.Module:
    """The residual stream's norm for this architecture."""
    return RMSNorm(dim) if arch.norm_type == "rmsnorm" else nn.LayerNorm(dim, eps=NORM_EPS)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with rotary positions; rows of `qkv.weight` are [Q; K; V], no biases."""

    rope_sin: Tensor
    rope_cos: Tensor

    def __init__(self, cfg: ModelConfig, arch: Architecture) -> None:
        super().__init__()
        self.H, self.D = cfg.H, cfg.C // cfg.H
        self.dropout = cfg.dropout
        self.qkv = nn.Linear(cfg.C, 3 * cfg.C, bias=False)
        self.proj = nn.Linear(cfg.C, cfg.C, bias=False)
        self.q_norm = RMSNorm(self.D) if arch.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D) if arch.qk_norm else nn.Identity()
        self.resid_dropout = Dropout(cfg.dropout)
        sin, cos = rope_cache(cfg.T, self.D, theta=cfg.rope_theta)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("rope_cos", cos, persistent=False)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        trace: Trace | None = None,
        mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Attend x (B, T, C) to itself and to what `cache` holds; returns (B, T, C).

        mask: (B, 1, T, T) bool, True where a query may see a key; None means causal. Not together with a cache.
        first: (B, T) int32, what the mask says in other words, if it can: the first position that each query sees.
        """
        B, T, C = x.shape
        start = cache.t if cache is not None else 0
        sin, cos = self.rope_sin[:, :, start : start + T], self.rope_cos[:, :, start : start + T]
        qkv = self.qkv(x)
        whole_rows = cache is None and trace is None and (mask is None or first is not None)
        if whole_rows and torch.is_grad_enabled() and native.usable(qkv):
            norms: tuple[()] | tuple[Tensor, Tensor] = ()
            if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
                norms = self.q_norm.weight, self.k_norm.weight
            return self.resid_dropout(self.proj(native.attention(qkv, norms, sin, cos, self.H, NORM_EPS, first)))
        q, k, v = qkv.view(B, T, 3, self.H, self.D).transpose(1, 3).unbind(2)  # each (B, H, T, D)
        q, k = apply_rope(self.q_norm(q), self.k_norm(k), sin, cos)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is None and start and T > 1:
            mask = _causal_mask(T, k.shape[2], x.device)
        if trace is None and not _explicit_is_faster(q, k):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=self._kernel_dropout(x), is_causal=mask is None and T > 1
            )
        else:
            y = self._explicit(q, k, v, mask, trace)
        return self.resid_dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)))

    def _kernel_dropout(self, x: Tensor) -> float:
        # On CPUs any dropout inside attention leaves the flash kernel: 2.8x slower (docs/log.md), so it is left out.
        return self.dropout if self.training and x.device.type == "cuda" else 0.0

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, trace: Trace | None) -> Tensor:
        """The same attention with its probabilities in sight; a trace gets them in float32, before any dropout."""
        B, H, T, _ = q.shape
        T_total = k.shape[2]
        if mask is None:
            mask = _causal_mask(T, T_total, q.device)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        bias = bias.expand(B, H, T, T_total).reshape(B * H, T, T_total)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=self.D**-0.5).view(B, H, T, T_total)
        if trace is None:
            return scores.softmax(dim=-1) @ v
        probs = scores.float().softmax(dim=-1)  # (B, H, T, T_total)
        trace.record(probs)
        return probs.to(v.dtype) @ v


def _explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    """Short bf16 rows on a CPU: matrix products and a softmax beat the fused kernel (docs/log.md)."""
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[2] > 1 and k.shape[2] <= SHORT


def _causal_mask(T: int, T_total: int, device: torch.device) -> Tensor:
    """(T, T_total) bool: the last T of T_total positions, each seeing itself and everything before."""
    return torch.ones(T, T_total, dtype=torch.bool, device=device).tril(T_total - T)


class SwiGLU(nn.Module):
    """fc_out(silu(fc_g x) * fc_a x) (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, arch: Architecture) -> None:
        super().__init__()
        self.fc_a = nn.Linear(cfg.C, cfg.d_ff, bias=arch.mlp_bias)
        self.fc_g = nn.Linear(cfg.C, cfg.d_ff, bias=arch.mlp_bias)
        self.fc_out = nn.Linear(cfg.d_ff, cfg.C, bias=arch.mlp_bias)
        self.resid_dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> the same shape."""
        gate, value = self.fc_g(x), self.fc_a(x)
        if torch.is_grad_enabled() and native.usable(gate, value):
            return self.resid_dropout(self.fc_out(native.swiglu(gate, value)))
        return self.resid_dropout(self.fc_out(F.silu(gate) * value))


class GeluMLP(nn.Module):
    """fc2(gelu(fc1 x)) with the exact (erf) GELU of the byte generation."""

    def __init__(self, cfg: ModelConfig, arch: Architecture) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.C, cfg.d_ff, bias=arch.mlp_bias)
        self.fc2 = nn.Linear(cfg.d_ff, cfg.C, bias=arch.mlp_bias)
        self.resid_dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> the same shape."""
        return self.resid_dropout(self.fc2(F.gelu(self.fc1(x))))


MLPS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": GeluMLP}


class Block(nn.Module):
    """Pre-norm residual block: x + attn(ln1 x), then x + mlp(ln2 x)."""

    def __init__(self, cfg: ModelConfig, arch: Architecture) -> None:
        super().__init__()
        self.ln1 = build_norm(arch, cfg.C)
        self.attn = CausalSelfAttention(cfg, arch)
        self.ln2 = build_norm(arch, cfg.C)
        self.mlp = MLPS[arch.mlp_type](cfg, arch)

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        trace: Trace | None = None,
        mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); the others as in `CausalSelfAttention.forward`."""
        x = x + self.attn(self.ln1(x), cache, trace, mask, first)
        return x + self.mlp(self.ln2(x))
