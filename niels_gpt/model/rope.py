"""Rotary position embedding (Su et al. 2021, RoFormer) on interleaved pairs (2j, 2j+1).

The tables are computed in float64 and cast once, so every device sees the same angles.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cache(
    T: int, D: int, *, theta: float, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return (sin, cos), each (1, 1, T, D/2): angle of position t and pair j is t * theta^(-2j/D)."""
    assert D % 2 == 0, f"rotary head size must be even, got {D}"
    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency[None, :]  # (T, D/2)
    sin, cos = angle.sin()[None, None], angle.cos()[None, None]
    return sin.to(device=device, dtype=dtype), cos.to(device=device, dtype=dtype)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn each pair of `x` (..., T, D) by its angle; sin and cos are (..., T, D/2)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One vectorised complex product instead of strided reads: 3x faster forward and backward (docs/log.md).
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2).to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def apply_rope(q: Tensor, k: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k, both (B, H, T, D), by tables (1, 1, >=T, D/2) that start at the first row's position."""
    T, D = q.shape[-2:]
    assert q.shape == k.shape and q.dtype == k.dtype, f"q {tuple(q.shape)} {q.dtype} against k {tuple(k.shape)}"
    assert D % 2 == 0, f"rotary head size must be even, got {D}"
    assert sin.shape == cos.shape and sin.shape[-1] == D // 2, f"table {tuple(sin.shape)} does not fit head size {D}"
    assert sin.shape[-2] >= T, f"table covers {sin.shape[-2]} positions, {T} needed"
    sin, cos = sin[..., :T, :], cos[..., :T, :]
    return rotate(q, sin, cos), rotate(k, sin, cos)
