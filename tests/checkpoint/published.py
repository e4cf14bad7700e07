"""Files as the two published generations wrote them, made from the compatibility sheet alone: torch.save, no package.

Names, shapes, key order and absent keys are the sheet's; the weights are random and large enough that outputs vary.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

V1_TRAIN = {  # the fourteen fields of the first generation
    **{"seed": 42, "B": 4, "total_steps_smoke": 10, "total_steps": 20, "eval_every": 5, "eval_steps": 2},
    **{"log_every": 5, "ckpt_every": 5, "base_lr": 3e-4, "warmup_steps": 2, "min_lr": 3e-5, "grad_clip": 1.0},
    **{"accum_steps": 1, "p_train": {"wiki": 0.784, "roam": 0.2, "primer": 0.016}},
}
V2_TRAIN = {  # the twenty-seven of the second
    **{"seed": 42, "B": 4, "total_steps": 20, "eval_every": 5, "eval_steps": 2, "log_every": 5, "ckpt_every": 5},
    **{"base_lr": 3e-4, "warmup_steps": 2, "min_lr": 3e-5, "grad_clip": 1.0, "accum_steps": 1, "amp": "auto"},
    **{"amp_dtype": "fp16", "activation_checkpointing": False, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95},
    **{"weight_decay": 0.1, "eps": 1e-8, "micro_B_eval": None, "eval_batches": None, "decay_norm_and_bias": True},
    **{"decay_embeddings": True, "save_best": True, "best_metric": "pretrain_val_loss", "best_metric_weights": None},
}


@dataclass(frozen=True)
class Shape:
    V: int
    T: int
    C: int
    L: int
    H: int
    d_ff: int
    rope_theta: float = 10000.0

    def model_cfg(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("V", "T", "C", "L", "H", "d_ff")}
        return {**sizes, "dropout": 0.1, "rope_theta": self.rope_theta}


V1_SHAPES = (
    Shape(256, 32, 16, 1, 2, 24),
    Shape(256, 48, 48, 3, 4, 192),
    Shape(256, 24, 40, 2, 1, 33, 500.0),
    Shape(256, 64, 64, 4, 8, 256),
)
V2_SHAPES = (
    Shape(512, 32, 16, 1, 2, 24),
    Shape(512, 48, 48, 3, 4, 144),
    Shape(512, 24, 40, 2, 1, 33, 500.0),
    Shape(512, 64, 64, 4, 8, 192),
)


def state_dict(generation: str, shape: Shape, seed: int) -> OrderedDict[str, Tensor]:
    """float32 tensors, in the order of the sheet."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.5 / columns**0.5

    def vector(size: int, around: float) -> Tensor:
        return around + 0.3 * torch.randn(size, generator=generator)

    C, d_ff, biased = shape.C, shape.d_ff, generation == "v1"
    state = OrderedDict({"tok_emb.weight": torch.randn(shape.V, C, generator=generator) * 0.4})

    def norm(name: str) -> None:
        state[f"{name}.weight"] = vector(C, 1.0)
        if biased:
            state[f"{name}.bias"] = vector(C, 0.0)

    for i in range(shape.L):
        block = f"blocks.{i}"
        norm(f"{block}.ln1")
        state[f"{block}.attn.qkv.weight"] = matrix(3 * C, C)
        state[f"{block}.attn.proj.weight"] = matrix(C, C)
        norm(f"{block}.ln2")
        layers = {"fc1": (d_ff, C), "fc2": (C, d_ff)}
        if not biased:
            layers = {"fc_a": (d_ff, C), "fc_g": (d_ff, C), "fc_out": (C, d_ff)}
        for name, (rows, columns) in layers.items():
            state[f"{block}.mlp.{name}.weight"] = matrix(rows, columns)
            state[f"{block}.mlp.{name}.bias"] = vector(rows, 0.0)
    norm("ln_f")
    state["lm_head.weight"] = state["tok_emb.weight"]
    return state


def checkpoint_bytes(generation: str, shape: Shape, seed: int = 0, *, tokenizer_sha256: str | None = None) -> bytes:
    """The file of one published generation, "v1" or "v2"."""
    state = state_dict(generation, shape, seed)
    content: dict[str, Any]
    if generation == "v1":
        content = {"model_cfg": shape.model_cfg(), "train_cfg": V1_TRAIN, "model_state": state, "step": 1000}
    else:
        extra = {"norm_type": "rmsnorm", "mlp_type": "swiglu"}
        attention = {"attn_type": "mha", "use_kv_cache": True, "kv_cache_dtype": "fp16"}
        meta = {"run_id": "20251217-010203-0a1b2c3d", "resolved_settings_path": "runs/x/resolved_settings.json"}
        content = {
            "model_cfg": {**shape.model_cfg(), "_raw": {**shape.model_cfg(), **extra, "attention": attention}},
            "train_cfg": {
                **V2_TRAIN,
                "_raw": {"seed": 42, "betas": (0.9, 0.95)},
                "_settings_meta": {**meta, "overrides_source": None, "tokenizer_sha256": tokenizer_sha256},
            },
            "model_state": state,
            "optimizer_state": None,
            "step": 1000,
            "best_val_loss": float("nan") if seed % 2 else 2.5,
        }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
