"""Plain values: all that a checkpoint may hold, so that reading one can never run code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCALARS: tuple[tuple[tuple[type, ...], Any], ...] = (  # what to convert, in this order (a bool is an int, too)
    ((bool, np.bool_), bool),
    ((int, np.integer), int),
    ((float, np.floating), float),
    ((str,), str),
    ((os.PathLike,), os.fspath),
)


def plain(value: Any, where: str) -> Any:
    """A copy of `value` made of dicts, lists, tuples, str, int, float, bool, None and dense CPU tensors only.

    Subclasses and numpy scalars are converted; ValueError names the place of anything else. Tensors that share memory
    (tied weights) stay one.
    """
    try:
        return _Copier().copy(value, where)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


class _Copier:
    def __init__(self) -> None:
        self._containers: dict[int, Any] = {}  # id of a container -> its copy; None while it is being copied
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any, where: str) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, (dict, list, tuple)):
            return self._container(value, where)
        for kinds, convert in _SCALARS:
            if isinstance(value, kinds):
                return convert(value)
        raise ValueError(f"{where} is a {type(value).__name__}; a checkpoint holds only tensors and plain values")

    def _container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], where: str) -> Any:
        if id(value) in self._containers:
            if self._containers[id(value)] is None:
                raise ValueError(f"{where} contains itself")
            return self._containers[id(value)]
        self._containers[id(value)] = None
        copied: Any
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, (str, int, np.integer)):
                    raise ValueError(f"{where} has the key {key!r}; keys must be text or whole numbers")
            copied = {self.copy(k, where): self.copy(v, f"{where}.{k}") for k, v in value.items()}
        else:
            items = [self.copy(v, f"{where}[{i}]") for i, v in enumerate(value)]
            copied = tuple(items) if isinstance(value, tuple) else items
        self._containers[id(value)] = copied
        return copied

    def _tensor(self, value: Tensor, where: str) -> Tensor:
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise ValueError(f"{where} is not an ordinary dense tensor")
        size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if size > stored:  # a few bytes that claim to be terabytes
            raise ValueError(f"{where} declares {size:,} bytes but holds {stored:,}")
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in self._tensors:
            copied = value.detach().cpu().contiguous()
            whole = copied.untyped_storage().nbytes() == size  # torch.save would write all of what a slice views
            self._tensors[key] = copied if whole else copied.clone()
        return self._tensors[key]


def tensors_in(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plain value with its place, such as `state.0.exp_avg`; shared containers are entered once."""
    pending, seen = [(where, value)], set()
    while pending:
        place, item = pending.pop()
        if isinstance(item, Tensor):
            yield place, item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            inside = list(item.items() if isinstance(item, dict) else enumerate(item))
            pending += [(f"{place}.{key}" if place else str(key), part) for key, part in reversed(inside)]


def tensor_bytes(value: Any) -> int:
    """Bytes of the distinct tensors of a plain value."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for _, t in tensors_in(value)}.values())


class NotFinite(ValueError):
    """A tensor holds NaN or an infinity."""


def check_finite(value: Any, where: str = "") -> None:
    """NotFinite naming the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors_in(value, where):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"{name} holds NaN or an infinity: such a checkpoint is refused")
