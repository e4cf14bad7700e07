"""Running out of memory: recognising it in all its disguises, freeing what can be freed, and what to advise."""

from __future__ import annotations

import gc

import torch

SIGNS = (  # in the text of a RuntimeError; CPU, CUDA libraries, MPS and C++ each say it in their own words
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
)


class DoesNotFit(ValueError):
    """Memory ran out and nothing can be made smaller; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for every form in which PyTorch, numpy and Python report that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def free_memory(device: str) -> None:
    """Hand back what a failed attempt has left behind; call it outside the `except` block, which keeps its tensors."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def advice(phase: str) -> str:
    """What makes a run need less memory, as the end of a sentence."""
    return (
        f"reduce the batch (training.{phase}.micro_B; raise accum_steps to keep it the same), set"
        f" training.{phase}.activation_checkpointing to true, or choose a shorter model.T or a smaller model"
    )
