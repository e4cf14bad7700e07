"""Which device, which precision, how to wait for it and what it has used: every choice with its reason."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

DEVICES = ("cpu", "mps", "cuda")
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def get_device() -> str:
    """The best available device: cuda > mps > cpu. A GPU that this PyTorch has no code for does not count."""
    if torch.cuda.is_available() and has_code_for(torch.cuda.get_device_capability(), cuda_code()):
        return "cuda"
    if torch.backends.mps.is_available() and torch.backends.mps.is_built():
        return "mps"
    return "cpu"


def cuda_code() -> list[str]:
    """What this PyTorch was compiled for, such as sm_90 or compute_90; [] where it does not say."""
    try:
        return list(torch.cuda.get_arch_list())
    except (AttributeError, RuntimeError):
        return []


def has_code_for(capability: tuple[int, int], code: Sequence[str]) -> bool:
    """Whether a GPU can run it: sm_XY as it is if X is its own and Y not above, compute_XY compiled if not above."""
    known = [(kind, divmod(int(digits), 10)) for kind, digits in re.findall(r"\b(sm|compute)_(\d+)", " ".join(code))]
    return not known or any(of <= capability and (kind == "compute" or of[0] == capability[0]) for kind, of in known)


def resolve_device(name: str | None) -> str:
    """A device asked for by name, or the best one; ValueError if it is unknown or not there."""
    if name is None or name == "auto":
        return get_device()
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)} (or leave it out)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but this PyTorch sees no CUDA GPU; leave --device out")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but this machine has no Metal GPU; leave --device out")
    return name


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bf16 natively (AVX512-BF16 or AMX); elsewhere bf16 is emulated and 18x slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Precision:
    """Autocast dtype (None = float32), whether gradients need a scaler, and why."""

    device: str
    dtype: torch.dtype | None
    needs_scaler: bool
    reason: str

    @property
    def name(self) -> str:
        """fp32, fp16 or bf16."""
        return {None: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context for forward passes; weights and optimizer stay float32."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)

    def describe(self) -> str:
        """As the training log prints it: `amp=true (bf16)` or `amp=false`."""
        return "amp=false" if self.dtype is None else f"amp=true ({self.name})"


def choose_precision(device: str, amp: bool | str, amp_dtype: str) -> Precision:
    """Resolve settings `amp` (True, False, "auto") and `amp_dtype` for a device.

    auto: CUDA bf16 from compute capability 8, else fp16 with a gradient scaler; MPS off; CPU bf16 where native.
    Raises ValueError for an amp_dtype that autocast cannot use.
    """
    if amp not in (True, False, "auto"):
        raise ValueError(f"amp must be true, false or 'auto', not {amp!r}")
    if amp is False:
        return Precision(device, None, False, "switched off by settings")
    if amp == "auto":
        capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
        return automatic_precision(device, capability, cpu_bf16=device == "cpu" and cpu_has_bf16())
    if amp_dtype not in AMP_DTYPES:
        raise ValueError(f"unsupported amp_dtype {amp_dtype!r}; with amp on, choose one of {', '.join(AMP_DTYPES)}")
    dtype = AMP_DTYPES[amp_dtype]
    if device == "cpu" and dtype is torch.float16:
        return Precision(device, None, False, "fp16 autocast does not train on CPUs; using float32")
    if device == "mps":
        print("warning: AMP on MPS is known to make losses diverge; set amp to false if it does", file=sys.stderr)
    return Precision(device, dtype, device == "cuda" and dtype is torch.float16, "asked for by settings")


def automatic_precision(device: str, capability: tuple[int, int], *, cpu_bf16: bool) -> Precision:
    """What "auto" is on a device of these abilities. capability: of a CUDA GPU."""
    if device == "cuda":
        if capability >= (8, 0):
            return Precision(device, torch.bfloat16, False, "this GPU multiplies bf16 natively")
        return Precision(device, torch.float16, True, "this GPU has fp16 tensor cores but no bf16")
    if device == "mps":
        return Precision(device, None, False, "autocast is unstable on MPS")
    if cpu_bf16:
        return Precision(device, torch.bfloat16, False, "this CPU multiplies bf16 natively")
    return Precision(device, None, False, "this CPU has no native bf16")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel; True if it agreed.

    A training step frees and takes the same hundreds of megabytes again and again. By default glibc unmaps large blocks
    at once, and every step pays thousands of page faults for getting them back: 1.3x per quickstart step (docs/log.md).
    Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Hand memory that was freed back to the kernel, where glibc keeps it: for when so much is not needed again."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def use_deterministic_kernels() -> None:
    """From now on only kernels that repeat to the bit, with a warning where PyTorch has none.

    On GPUs the backward pass of fused attention, among others, adds in an order that changes from run to run.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True, warn_only=True)


def synchronize(device: str) -> None:
    """Wait for queued work, so that a clock tells the truth."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def memory_in_use(device: str) -> int:
    """Bytes, as the device tells them: CUDA the peak so far, MPS the driver's figure, CPUs the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def peak_memory(device: str) -> int:
    """Bytes at the highest so far: `memory_in_use` on GPUs; on CPUs of this process since its program began."""
    if device != "cpu":
        return memory_in_use(device)
    try:  # not getrusage: on Linux a new process begins with the peak of the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
