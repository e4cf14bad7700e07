"""What a plan may use of this machine: the device, its precision, memory and disk."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from niels_gpt.device import choose_precision, resolve_device
from niels_gpt.settings import PhaseSettings

USABLE = 0.9  # of what is free, of memory and disk alike
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))  # Linux containers


@dataclass(frozen=True)
class Machine:
    """Device and limits. On CPUs memory is that of a whole process, on GPUs what PyTorch allocates."""

    device: str
    name: str
    precision: str
    memory_bytes: int  # that a run may take
    disk_bytes: int  # that a run may fill


def this_machine(
    device: str | None, options: PhaseSettings, folder: Path, *, memory_bytes: int | None = None
) -> Machine:
    """The device asked for (None: the best). memory_bytes: what there is of its memory; None = what is free now."""
    chosen = resolve_device(device)
    free = _free_memory(chosen) if memory_bytes is None else memory_bytes
    return Machine(
        chosen,
        _name(chosen),
        choose_precision(chosen, options.amp, options.amp_dtype).name,
        int(USABLE * free),
        int(USABLE * shutil.disk_usage(folder).free),
    )


def _free_memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    if device == "mps":
        return min(free, int(torch.mps.recommended_max_memory()))
    try:
        most, used = (path.read_text().strip() for path in CGROUP)
        return free if most == "max" else min(free, int(most) - int(used))
    except (OSError, ValueError):
        return free


def _name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} threads"
