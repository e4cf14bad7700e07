"""Small checkpoints for tests."""

from pathlib import Path
from typing import Any

import torch

from niels_gpt.checkpoint import save_checkpoint
from niels_gpt.config import NEW, Architecture, ModelConfig
from niels_gpt.model.gpt import GPT

TINY = ModelConfig(V=33, T=8, C=16, L=2, H=2, d_ff=24, dropout=0.1, rope_theta=10000.0)


def trained(arch: Architecture = NEW, cfg: ModelConfig = TINY) -> tuple[GPT, torch.optim.Optimizer]:
    """A model and its AdamW after one step."""
    torch.manual_seed(0)
    model = GPT(cfg, arch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    x = torch.arange(16).reshape(2, 8) % cfg.V
    model(x, x).backward()
    optimizer.step()
    return model, optimizer


def save(path: Path, arch: Architecture = NEW, **changes: Any) -> GPT:
    """Save a tiny checkpoint, with keyword arguments of `save_checkpoint` changed; returns its model."""
    model, optimizer = trained(arch)
    values: dict[str, Any] = {
        "model_cfg": TINY,
        "train_cfg": {"seed": 42, "B": 2},
        "model": model,
        "optimizer": optimizer,
        "step": 7,
        "best_val_loss": 2.5,
    }
    save_checkpoint(path, **{**values, **changes})
    return model


def equal(a: Any, b: Any) -> bool:
    """Same plain values, tensors to the bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b
