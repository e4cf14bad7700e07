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

from niels_gpt.device import synchronize

KEYS = ("V", "T", "C", "L", "H", "d_ff")


def quickstart_shape() -> dict[str, int]:
    """The model and microbatch that `niels-gpt quickstart` trains."""
    config = json.loads((Path(__file__).resolve().parents[1] / "configs/quickstart.json").read_text())
    return {key: config["model"][key] for key in KEYS} | {"B": config["training"]["pretrain"]["micro_B"]}


SHAPES: dict[str, dict[str, int]] = {
    "quickstart": quickstart_shape(),
    "default": {"V": 16000, "T": 512, "C": 384, "L": 8, "H": 6, "d_ff": 1152, "B": 4},
    "gpt2": {"V": 50257, "T": 1024, "C": 768, "L": 12, "H": 12, "d_ff": 2048, "B": 16},  # 124 M parameters
}


def machine(device: str = "cpu") -> str:
    """One line: processor, threads, torch."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def gemm_peak(dtype: torch.dtype, rounds: int = 5, device: str = "cpu") -> float:
    """Best FLOP/s of a square matrix product, large enough to fill the device."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def flops_per_token(shape: Mapping[str, int], matmul_parameters: int | None = None) -> float:
    """Training FLOPs: 6 per matmul parameter, 6 L T C for causal attention (half of the square).

    matmul_parameters: of the model at hand; by default those of ours at this shape.
    """
    C, L, T = shape["C"], shape["L"], shape["T"]
    ours = shape["V"] * C + L * (4 * C * C + 3 * C * shape["d_ff"])
    return 6.0 * (matmul_parameters or ours) + 6.0 * L * T * C


def hugging_face_twin(shape: Mapping[str, int], family: str = "Qwen3") -> nn.Module:
    """transformers' model of the same shape: Qwen3, the architecture of new models of ours, or Llama."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
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
    return getattr(transformers, f"{family}ForCausalLM")(config)


def interleaved(
    steps: Mapping[str, Callable[[], Any]], *, warmup: int, rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns, so that a busy moment hits all of them.

    Every other round goes backwards, so that none always follows the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name in list(steps)[:: 1 if i % 2 == 0 else -1]:
            synchronize(device)
            began = time.perf_counter()
            steps[name]()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_and_spread(values: list[float]) -> tuple[float, float, float]:
    """(median, best, worst) of rates, higher is better."""
    return statistics.median(values), max(values), min(values)
