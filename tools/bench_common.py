"""What the speed benchmarks share: shapes, a Hugging Face twin of the model, GEMM peak, interleaved timing."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

KEYS = ("V", "T", "C", "L", "H", "d_ff")


def quickstart_shape() -> dict[str, int]:
    """The model and microbatch that `niels-gpt quickstart` trains."""
    config = json.loads((Path(__file__).resolve().parents[1] / "configs/quickstart.json").read_text())
    return {key: config["model"][key] for key in KEYS} | {"B": config["training"]["pretrain"]["micro_B"]}


SHAPES: dict[str, dict[str, int]] = {
    "quickstart": quickstart_shape(),
    "default": {"V": 16000, "T": 512, "C": 384, "L": 8, "H": 6, "d_ff": 1152, "B": 4},
}


def machine() -> str:
    """One line: processor, threads, torch."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def gemm_peak(dtype: torch.dtype, size: int = 2048, rounds: int = 5) -> float:
    """Best FLOP/s of a square matrix product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(rounds + 1):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def flops_per_token(shape: Mapping[str, int]) -> float:
    """Training FLOPs: 6 per matmul parameter, 6 L T C for causal attention (half of the square)."""
    C, L, T = shape["C"], shape["L"], shape["T"]
    matmul = shape["V"] * C + L * (4 * C * C + 3 * C * shape["d_ff"])
    return 6.0 * matmul + 6.0 * L * T * C


def hugging_face_twin(shape: Mapping[str, int]) -> nn.Module:
    """transformers' Qwen3 of the same shape: the same architecture as a new model of ours."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape["V"],
        hidden_size=shape["C"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["L"],
        num_attention_heads=shape["H"],
        num_key_value_heads=shape["H"],
        head_dim=shape["C"] // shape["H"],
        max_position_embeddings=shape["T"],
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def interleaved(steps: Mapping[str, Callable[[], Any]], *, warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns, so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_and_spread(values: list[float]) -> tuple[float, float, float]:
    """(median, best, worst) of rates, higher is better."""
    return statistics.median(values), max(values), min(values)
