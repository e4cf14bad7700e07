"""Model FLOPs utilisation: the arithmetic a model needs per second, over what this machine was measured to do.

Method: the best of several square matrix products in the run's precision, on the same device and threads, right before
the run. It is what a program can reach here, not a figure of a vendor.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import nn

from niels_gpt.device import Precision, synchronize
from niels_gpt.model.gpt import GPT

PEAK_SECONDS = 0.3  # how long to measure
PEAK_SIZE = {"cpu": 1536, "mps": 2048, "cuda": 8192}  # rows and columns: large enough to reach the peak


def flops_per_token(matmul_parameters: int, *, layers: int, width: int, context: int) -> float:
    """FLOPs of training on one token: 6 per weight of a matrix product, 6 L T C for causal attention.

    Two per multiply-add, forward once and backward twice; attention sees half of the square. Recomputing activations
    does not count: it is not what the model needs.
    """
    return 6.0 * matmul_parameters + 6.0 * layers * context * width


def training_flops(model: GPT) -> float:
    """`flops_per_token` of a model; its tied head multiplies, its embedding only looks up."""
    matmuls = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return flops_per_token(matmuls, layers=model.cfg.L, width=model.cfg.C, context=model.cfg.T)


def matmul_peak(precision: Precision) -> float:
    """FLOP/s of the best matrix product seen in `PEAK_SECONDS`; measured once per process for each way to compute."""
    dtype = precision.dtype or torch.float32
    return _peak(precision.device, dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _peak(device: str, dtype: torch.dtype, threads: int, float32_precision: str) -> float:
    return best_matmul(device, dtype, PEAK_SIZE[device], seconds=PEAK_SECONDS)


def best_matmul(device: str, dtype: torch.dtype, size: int, *, seconds: float = 0.0, rounds: int = 2) -> float:
    """FLOP/s of the best of at least `rounds` products of two square matrices, and as many as `seconds` allow."""
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)  # no random numbers: training must not notice
    best, done, stop = float("inf"), 0, time.perf_counter() + seconds
    while done < rounds or time.perf_counter() < stop:
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best, done = min(best, time.perf_counter() - began), done + 1
    return 2.0 * size**3 / best
