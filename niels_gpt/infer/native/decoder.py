"""One token for each of some sequences, computed natively: the whole model in one call on all cores.

The fast twin of `GPT.forward(x, cache=...)` for one new position per sequence, on a CPU, from packed weights in
float32, float16 or int8. It reads and extends the same cache, so a stream may change between the two at any token.
`decoder_for` keeps a model's packed weights until the model changes.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from niels_gpt.infer.cache import KVCache
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.model.gpt import GPT
from niels_gpt.model.rope import rope_cache
from niels_gpt.native import build

MAIN = Path(__file__).parent / "decoder.cpp"
KINDS = {"fp32": 0, "fp16": 1, "int8": 2}
HALF_MAX = 65504.0
BYTES_PER_THREAD = 1 << 20  # of weights: below this a second thread costs more than it brings
SAMPLES = 16  # values of each tensor that are compared with the packed model's


def missing() -> str | None:
    """Why there is no compiled decoder, or None; compiles it if that was never done."""
    loaded = build.load(MAIN, _declared)
    return loaded if isinstance(loaded, str) else None


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("V", "T", "C", "L", "H", "d_ff", "layernorm", "gelu", "qk_norm")),
        ("eps", ctypes.c_float),
    ]


class NativeDecoder:
    """A model's weights, packed, and the threads that multiply them. ValueError or MemoryError if it cannot be made."""

    def __init__(self, model: GPT, weights: str = "fp32", threads: int | None = None) -> None:
        """weights: how matrices are stored, one of KINDS; norms, biases, embeddings and the cache stay float32."""
        library = build.load(MAIN, _declared)
        if isinstance(library, str):
            raise ValueError(library)
        cfg, arch = model.cfg, model.arch
        state = model.state_dict()
        if weights == "fp16" and any(t.abs().max() > HALF_MAX for t in state.values() if t.ndim == 2):
            raise ValueError("a weight is too large for float16")
        size = sum(t.numel() for t in state.values()) * {"fp32": 4, "fp16": 2, "int8": 1}[weights]
        self.threads = threads or max(1, min(torch.get_num_threads(), size // BYTES_PER_THREAD))
        self.weights = weights
        self._V = cfg.V
        shape = _Shape(
            *(cfg.V, cfg.T, cfg.C, cfg.L, cfg.H, cfg.d_ff),
            *(arch.norm_type == "layernorm", arch.mlp_type == "gelu", arch.qk_norm),
            NORM_EPS,
        )
        sin, cos = rope_cache(cfg.T, cfg.C // cfg.H, theta=cfg.rope_theta)
        tensors = _ordered(state, cfg.L, arch.mlp_type == "gelu", sin, cos)
        self._kept = tensors[:3]  # read in place: embeddings, sin, cos
        pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
        handle = library.decoder_new(ctypes.byref(shape), pointers, KINDS[weights], self.threads)
        if not handle:
            raise MemoryError(f"no memory for a packed copy of the weights ({size / 1e6:.0f} MB)")
        self._library, self._handle, self._pid = library, handle, os.getpid()
        self.bytes = int(library.decoder_bytes(handle))  # of packed weights: what every token reads
        self._free = weakref.finalize(self, _free, library, handle, self._pid)

    @property
    def usable(self) -> bool:
        """False in a forked child: it has none of the threads."""
        return self._pid == os.getpid()

    def read(self) -> None:
        """Read all packed weights once and do nothing else: no token can be faster (for benchmarks)."""
        self._library.decoder_read(self._handle)

    def step(self, tokens: Sequence[int], positions: Sequence[int], cache: KVCache, rows: Sequence[int]) -> Decoded:
        """Feed tokens[i] at positions[i] to row rows[i] of a float32 cache on the CPU; its key and value go there.

        The caller keeps the ids inside the vocabulary, the positions inside the cache and the rows distinct.
        """
        B, k = len(tokens), cache.k
        assert k.dtype == torch.float32 and k.device.type == "cpu" and k.stride()[-2:] == (k.shape[-1], 1)
        assert k.stride() == cache.v.stride() and max(positions) < cache.T_max
        logits, stats = torch.empty(B, self._V), torch.empty(B, 2)
        row = k.stride(1)
        self._library.decoder_step(
            self._handle,
            B,
            (ctypes.c_int32 * B)(*tokens),
            (ctypes.c_int32 * B)(*positions),
            k.data_ptr(),
            cache.v.data_ptr(),
            (ctypes.c_int64 * B)(*(r * row for r in rows)),
            k.stride(0),
            k.stride(2),
            logits.data_ptr(),
            stats.data_ptr(),
        )
        return Decoded(logits, stats)


class Decoded:
    """Logits (B, V) and their statistics: row i's log of the sum of exponentials, and its entropy in nats."""

    def __init__(self, logits: Tensor, stats: Tensor) -> None:
        self.logits = logits
        self.logsumexp, self.entropy = stats.unbind(1)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.decoder_new.restype = pointer
    library.decoder_new.argtypes = [pointer, pointer, number, number]
    library.decoder_step.restype = None
    library.decoder_step.argtypes = [pointer, number, *[pointer] * 5, size, size, pointer, pointer]
    library.decoder_free.restype = None
    library.decoder_free.argtypes = [pointer]
    library.decoder_read.restype = ctypes.c_float
    library.decoder_read.argtypes = [pointer]
    library.decoder_bytes.restype = size
    library.decoder_bytes.argtypes = [pointer]
    return library


def _free(library: ctypes.CDLL, handle: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has a copy of the memory and none of the threads to join
        library.decoder_free(handle)


def _ordered(state: dict[str, Tensor], L: int, gelu: bool, sin: Tensor, cos: Tensor) -> list[Tensor | None]:
    """The tensors in the order of decoder_new, each contiguous."""
    up, gate, down = ("fc1", None, "fc2") if gelu else ("fc_a", "fc_g", "fc_out")
    names: list[str] = ["tok_emb.weight"]
    last = ["ln_f.weight", "ln_f.bias", "lm_head.weight"]
    for i in range(L):
        b = f"blocks.{i}."
        last += [f"{b}ln1.weight", f"{b}ln1.bias", f"{b}attn.qkv.weight", f"{b}attn.proj.weight"]
        last += [f"{b}attn.q_norm.weight", f"{b}attn.k_norm.weight", f"{b}ln2.weight", f"{b}ln2.bias"]
        last += [f"{b}mlp.{name}.{kind}" for name in (gate, up, down) for kind in ("weight", "bias")]
    first: list[Tensor | None] = [state[names[0]].detach(), sin, cos]
    return [None if t is None else t.contiguous() for t in (*first, *(state.get(name) for name in last))]


_LOCK = threading.Lock()
_PACKED: weakref.WeakKeyDictionary[GPT, dict[str, tuple[tuple[object, ...], NativeDecoder]]] = (
    weakref.WeakKeyDictionary()
)


def decoder_for(model: GPT, weights: str = "fp32") -> NativeDecoder | str:
    """The model's packed decoder, made now or kept from before, or the reason why there can be none."""
    reason = _unsupported(model)
    if reason is not None:
        return reason
    with _LOCK:
        kept = _PACKED.setdefault(model, {})
        mark = _mark(model)
        if weights in kept and kept[weights][0] == mark and kept[weights][1].usable:
            return kept[weights][1]
        kept.clear()  # other storage of the same model, or weights of before a training step: not worth the memory
        try:
            decoder = NativeDecoder(model, weights)
        except (ValueError, MemoryError) as error:
            return str(error)
        kept[weights] = (mark, decoder)
        return decoder


def _unsupported(model: GPT) -> str | None:
    parameters = list(model.parameters())
    if any(p.device.type != "cpu" for p in parameters):
        return "the model is not on the CPU"
    if any(p.dtype != torch.float32 for p in parameters):
        return "the model is not in float32"
    if type(model) is not GPT:
        return "the architecture is unknown to the native decoder"
    if is_watched(model):
        return "somebody watches the model's modules"
    return None


def is_watched(model: GPT) -> bool:
    """Whether somebody hooked into the model's modules: then every one of them has to be called."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _mark(model: GPT) -> tuple[object, ...]:
    """Changes when the weights do: where they are, how often they were written, and a sample of their values.

    Writes through `.data` are not counted by PyTorch; the sample notices those that touch whole tensors.
    """
    tensors = [p.detach() for p in model.parameters()]
    written = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    sampled = [t.flatten()[:: max(1, t.numel() // SAMPLES)][:SAMPLES] for t in tensors]
    return (torch.get_num_threads(), written, torch.cat(sampled).numpy().tobytes())
