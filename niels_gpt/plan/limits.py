"""What a plan may use of this machine: the device, its precision, memory and disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from niels_gpt import machine
from niels_gpt.device import choose_precision, resolve_device
from niels_gpt.settings import PhaseSettings

USABLE = 0.9  # of what is free, of memory and disk alike


@dataclass(frozen=True)
class Limits:
    """Device and limits. On CPUs memory is that of a whole process, on GPUs what PyTorch allocates."""

    device: str
    name: str
    precision: str
    memory_bytes: int  # that a run may take
    disk_bytes: int  # that a run may fill


def limits_here(device: str | None, options: PhaseSettings, folder: Path, *, memory_bytes: int | None = None) -> Limits:
    """The device asked for (None: the best). memory_bytes: what there is of its memory; None = what is free now."""
    chosen, facts = resolve_device(device), machine.probe()
    free = facts.gpu.free if chosen == "cuda" and facts.gpu is not None else facts.available
    if chosen == "mps":
        free = min(free, int(torch.mps.recommended_max_memory()))
    return Limits(
        chosen,
        facts.describe(chosen),
        choose_precision(chosen, options.amp, options.amp_dtype).name,
        int(USABLE * (free if memory_bytes is None else memory_bytes)),
        int(USABLE * shutil.disk_usage(folder).free),
    )
