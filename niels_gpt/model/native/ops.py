"""What a float32 training step does between its matrix products on a CPU, compiled, with gradients written out.

Each function has a twin in PyTorch where it is called, which takes over where `usable` says no: on other devices and
types, under autocast and torch.compile, without a C++ compiler. The same bits at any number of threads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from niels_gpt.native import build

MAIN = Path(__file__).parent / "kernels.cpp"
_wanted = True


def switch(on: bool) -> None:
    """Let this process train with compiled code, or with PyTorch only."""
    global _wanted
    _wanted = on


def missing() -> str | None:
    """Why there is no compiled code, or None; compiles it if that was never done."""
    loaded = build.load(MAIN, _declared)
    return loaded if isinstance(loaded, str) else None


def usable(*tensors: Tensor) -> bool:
    """Whether compiled code can take these: plain float32 on a CPU, eager, wanted, and there is a compiler."""
    return (
        not torch.compiler.is_compiling()
        and _wanted
        and all(t.dtype is torch.float32 and t.device.type == "cpu" and type(t) in PLAIN for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and missing() is None
    )


PLAIN = (Tensor, nn.Parameter)  # not what is sharded, fake or otherwise without numbers of its own


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, of one shape."""
    y: Tensor = _SwiGLU.apply(gate, value)
    return y


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zeros with probability `rate`, the rest over 1 - rate; the mask is a function of PyTorch's next random number."""
    y: Tensor = _Dropout.apply(x, rate)
    return y


def attention(
    qkv: Tensor,
    norms: tuple[()] | tuple[Tensor, Tensor],
    sin: Tensor,
    cos: Tensor,
    H: int,
    eps: float,
    first: Tensor | None = None,
) -> Tensor:
    """qkv (B, T, 3 H D) -> (B, T, H D): softmax(q k^T / sqrt(D)) v, each position seeing those up to its own.

    q and k are normed by the two weights `norms` (D,), if any, and rotated by sin and cos (1, 1, T, D / 2).
    first: (B, T) int32, the first position that each sees, at most its own; by default 0.
    """
    q_norm, k_norm = norms or (None, None)
    y: Tensor = _Attention.apply(qkv, q_norm, k_norm, sin, cos, first, H, eps)
    return y


def cross_entropy_(logits: Tensor, target: Tensor) -> Tensor:
    """Nats (N,) of target (N,) under logits (N, V), which become their own gradient: softmax - one-hot."""
    assert logits.is_contiguous()
    nats, target = logits.new_empty(len(logits)), target.contiguous()
    N, V = logits.shape
    _library().cross_entropy(logits.data_ptr(), target.data_ptr(), nats.data_ptr(), N, V)
    return nats


def _library() -> ctypes.CDLL:
    library = build.load(MAIN, _declared)
    assert isinstance(library, ctypes.CDLL)
    library.use_threads(_REGION, torch.get_num_threads())
    return library


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        C = x.shape[-1]
        rows = x.numel() // C
        y, inverse = torch.empty_like(x), x.new_empty(rows)
        _library().rmsnorm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), inverse.data_ptr(), rows, C, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        read = (t.data_ptr() for t in (grad, x, weight, inverse))
        _library().rmsnorm_backward(*read, grad_x.data_ptr(), grad_weight.data_ptr(), len(inverse), x.shape[-1])
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        assert gate.shape == value.shape
        gate, value = gate.contiguous(), value.contiguous()
        y = torch.empty_like(gate)
        _library().swiglu(gate.data_ptr(), value.data_ptr(), y.data_ptr(), y.numel())
        ctx.save_for_backward(gate, value)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad, grad_gate, grad_value = grad.contiguous(), torch.empty_like(gate), torch.empty_like(value)
        pointers = (t.data_ptr() for t in (grad, gate, value, grad_gate, grad_value))
        _library().swiglu_backward(*pointers, gate.numel())
        return grad_gate, grad_value


class _Dropout(torch.autograd.Function):
    """Keeps a number instead of a mask: the way back draws the same bits again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        ctx.key, ctx.rate = int(torch.randint(2**63 - 1, ())), rate
        return _dropped(x, ctx.key, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropped(grad, ctx.key, ctx.rate), None


def _dropped(x: Tensor, key: int, rate: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _library().dropout(x.data_ptr(), y.data_ptr(), key, int(rate * 2**32), 1 / (1 - rate), x.numel())
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        sin: Tensor,
        cos: Tensor,
        first: Tensor | None,
        H: int,
        eps: float,
    ) -> Tensor:
        B, T, width = qkv.shape
        D = width // (3 * H)
        assert sin.shape == cos.shape == (1, 1, T, D // 2), f"tables {tuple(sin.shape)} for {T} positions of {D}"
        assert first is None or (first.shape == (B, T) and first.dtype is torch.int32 and first.is_contiguous())
        qkv, sin, cos = qkv.contiguous(), sin.contiguous(), cos.contiguous()
        y, logsum = qkv.new_empty(B, T, H * D), qkv.new_empty(B, H, T)
        ctx.save_for_backward(qkv, q_norm, k_norm, sin, cos, first, y, logsum)
        ctx.sizes = (B, T, H, D, eps)
        _library().attention(*map(_pointer, (qkv, q_norm, k_norm, sin, cos, first, y, logsum)), *ctx.sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        qkv, q_norm = kept[:2]
        grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
        grad_norms = None if q_norm is None else qkv.new_empty(2, len(q_norm))
        _library().attention_backward(*map(_pointer, (grad, *kept, grad_qkv, grad_norms)), *ctx.sizes)
        grad_q_norm, grad_k_norm = (None, None) if grad_norms is None else grad_norms.unbind()
        return grad_qkv, grad_q_norm, grad_k_norm, None, None, None, None, None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _region() -> int | None:
    """Address of the function that starts libgomp's threads, if PyTorch's are of that kind."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


_REGION = _region()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    arguments = {
        "use_threads": [pointer, ctypes.c_int],
        "rmsnorm": [*[pointer] * 4, size, size, real],
        "rmsnorm_backward": [*[pointer] * 6, size, size],
        "swiglu": [*[pointer] * 3, size],
        "swiglu_backward": [*[pointer] * 5, size],
        "dropout": [pointer, pointer, ctypes.c_uint64, ctypes.c_uint32, real, size],
        "attention": [*[pointer] * 8, *[size] * 4, real],
        "attention_backward": [*[pointer] * 11, *[size] * 4, real],
        "cross_entropy": [*[pointer] * 3, size, size],
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, types
    return library
