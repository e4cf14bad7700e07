"""The key-value cache: what every layer's attention stored, preallocated once and filled in place.

It knows tensors only. `GPT.forward(x, cache=...)` reads and extends it; keys are stored after their rotation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from niels_gpt.model.gpt import GPT


@dataclass(eq=False)
class KVCache:
    """Keys and values of all layers, k and v each (L, B, H, T_max, D); positions 0..t-1 are filled."""

    k: Tensor
    v: Tensor
    t: int = 0
    _layers: list[_LayerSlot] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.k.ndim == 5 and self.k.shape == self.v.shape, (
            f"k and v must both be (L, B, H, T_max, D), got {tuple(self.k.shape)} and {tuple(self.v.shape)}"
        )
        assert 0 <= self.t <= self.T_max, f"t={self.t} is outside a cache of {self.T_max} positions"
        self._layers = [_LayerSlot(self, k, v) for k, v in zip(self.k, self.v, strict=True)]

    @property
    def L(self) -> int:
        """Layers."""
        return self.k.shape[0]

    @property
    def B(self) -> int:
        """Rows: sequences."""
        return self.k.shape[1]

    @property
    def T_max(self) -> int:
        """Positions that there is room for."""
        return self.k.shape[3]

    def layer(self, index: int) -> _LayerSlot:
        """One layer, for attention to read and extend."""
        return self._layers[index]

    def advance(self, T: int) -> None:
        """All layers have stored T more positions."""
        self.t += T

    def reset(self) -> None:
        """Forget every position; the memory stays."""
        self.t = 0


class _LayerSlot:
    """One layer's share of a KVCache: views (B, H, T_max, D), and the position the cache has reached."""

    def __init__(self, cache: KVCache, k: Tensor, v: Tensor) -> None:
        self._cache, self._k, self._v = cache, k, v

    @property
    def t(self) -> int:
        return self._cache.t

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) after the filled positions; returns views of everything stored, (B, H, t + T, D)."""
        start = self._cache.t
        end = start + k.shape[2]
        assert end <= self._k.shape[2], f"{end} positions do not fit a cache of {self._k.shape[2]}"
        self._k[:, :, start:end] = k
        self._v[:, :, start:end] = v
        return self._k[:, :, :end].to(k.dtype), self._v[:, :, :end].to(v.dtype)  # no copy when the dtypes agree


def allocate_kv_cache(
    *, L: int, B: int, H: int, T_max: int, D: int, device: torch.device | str, dtype: torch.dtype
) -> KVCache:
    """An empty cache for L layers, B rows, H heads of size D and at most T_max positions."""
    shape = (L, B, H, T_max, D)
    return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))


def cache_for(model: GPT, *, B: int, T_max: int) -> KVCache:
    """An empty cache with the shape, device and dtype of `model`."""
    cfg, weight = model.cfg, model.tok_emb.weight
    return allocate_kv_cache(
        L=cfg.L, B=B, H=cfg.H, T_max=T_max, D=cfg.C // cfg.H, device=weight.device, dtype=weight.dtype
    )
