"""The machine as plain facts, found once. What follows from them others decide, so tests can invent machines."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from niels_gpt.device import cpu_has_bf16, cuda_code, has_code_for, usable_cores
from niels_gpt.native import build

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    memory: int  # bytes in all
    free: int  # bytes
    capability: tuple[int, int]
    usable: bool = True  # this PyTorch has code for it


@dataclass(frozen=True)
class Machine:
    """What is there. Bytes and counts; None = not there."""

    system: str  # Linux, Darwin, Windows
    processor: str
    cores: int  # that this process may use
    memory: int  # bytes, or what the container allows
    available: int  # bytes of it that nobody uses
    cpu_bf16: bool
    gpu: Gpu | None
    mps: bool
    cxx: str | None  # path of a C++ compiler
    triton: bool  # its package is installed
    torch: str
    python: str

    def describe(self, device: str) -> str:
        """What speed depends on, in a line."""
        if device == "cuda" and self.gpu is not None:
            return f"{self.gpu.name}, {self.gpu.memory / 2**30:.0f} GiB, torch {self.torch}"
        threads = torch.get_num_threads()
        return f"{self.processor}, {threads} threads, {self.memory / 2**30:.0f} GiB, torch {self.torch}"

    def memory_of(self, device: str) -> int:
        """Bytes that a model may live in: the GPU's own, else the computer's."""
        return self.gpu.memory if device == "cuda" and self.gpu is not None else self.memory


def probe() -> Machine:
    """The facts of this machine."""
    memory = psutil.virtual_memory()
    limit, free = _container() or (memory.total, memory.available)
    return Machine(
        system=platform.system(),
        processor=_processor(),
        cores=usable_cores(),
        memory=min(memory.total, limit),
        available=min(memory.available, free),
        cpu_bf16=cpu_has_bf16(),
        gpu=_gpu(),
        mps=torch.backends.mps.is_available() and torch.backends.mps.is_built(),
        cxx=build.compiler(),
        triton=importlib.util.find_spec("triton") is not None,
        torch=str(torch.__version__),
        python=platform.python_version(),
    )


def _gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    capability = torch.cuda.get_device_capability(0)
    return Gpu(properties.name, total, free, capability, has_code_for(capability, cuda_code()))


def _container() -> tuple[int, int] | None:
    """(limit, free) bytes of the control group around this process (Docker, Slurm), if it has a limit."""
    for limit, used in CGROUPS:
        try:
            most = int(Path(limit).read_text())
            return most, most - int(Path(used).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def _processor() -> str:
    """Its name for people."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or sys.platform
