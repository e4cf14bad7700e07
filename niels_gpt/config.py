"""The two records that describe a model and a run: frozen, without defaults (`settings` owns every default)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a GPT: the eight keys every checkpoint carries under `model_cfg`."""

    V: int  # vocabulary size
    T: int  # context length, tokens
    C: int  # residual width
    L: int  # number of blocks
    H: int  # attention heads; head size D = C // H
    d_ff: int  # MLP width
    dropout: float
    rope_theta: float

    def __post_init__(self) -> None:
        for name in ("V", "T", "C", "L", "H", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.C % self.H:
            fits = [h for h in range(1, self.C + 1) if self.C % h == 0 and (self.C // h) % 2 == 0]
            raise ValueError(
                f"model.C={self.C} is not divisible by model.H={self.H}; pick H from {fits or 'an even C'}"
            )
        if (self.C // self.H) % 2:
            raise ValueError(f"head size C/H={self.C // self.H} must be even: rotary embeddings turn pairs of numbers")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a checkpoint's `model_cfg`; keys other than the eight (such as `_raw`) are ignored."""
        names = [f.name for f in fields(cls)]
        missing = [n for n in names if n not in values]
        if missing:
            raise ValueError(f"model_cfg lacks {', '.join(missing)}")
        return cls(**{n: values[n] for n in names})


@dataclass(frozen=True)
class Architecture:
    """What the eight keys leave open. Never stored: `checkpoint` recognises it from the tensor names."""

    norm_type: str  # "rmsnorm" | "layernorm"
    mlp_type: str  # "swiglu" | "gelu"
    mlp_bias: bool
    qk_norm: bool  # RMSNorm with weight on each head's q and k before the rotation


V1 = Architecture(norm_type="layernorm", mlp_type="gelu", mlp_bias=True, qk_norm=False)  # published byte models
V2 = Architecture(norm_type="rmsnorm", mlp_type="swiglu", mlp_bias=True, qk_norm=False)  # published subword models
NEW = Architecture(norm_type="rmsnorm", mlp_type="swiglu", mlp_bias=False, qk_norm=True)  # = Qwen3: new models


@dataclass(frozen=True)
class TrainConfig:
    """One phase of training: the 27 keys a checkpoint carries under `train_cfg`, in their published order."""

    seed: int
    B: int  # rows of one microbatch
    total_steps: int
    eval_every: int
    eval_steps: int
    log_every: int
    ckpt_every: int
    base_lr: float
    warmup_steps: int
    min_lr: float
    grad_clip: float
    accum_steps: int
    amp: bool | str
    amp_dtype: str
    activation_checkpointing: bool
    optimizer: str
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    micro_B_eval: int | None
    eval_batches: int | None
    decay_norm_and_bias: bool
    decay_embeddings: bool
    save_best: bool
    best_metric: str
    best_metric_weights: dict[str, float] | None


def to_dict(config: ModelConfig | TrainConfig | Architecture) -> dict[str, Any]:
    """The record as plain JSON-like values."""
    return asdict(config)
