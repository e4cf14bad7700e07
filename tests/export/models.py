"""Small checkpoints for export tests: random weights large enough that outputs vary, with real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from niels_gpt import files
from niels_gpt.checkpoint import save_checkpoint
from niels_gpt.config import NEW, V1, V2, Architecture, ModelConfig
from niels_gpt.model.gpt import GPT

PLAIN = Architecture(norm_type="rmsnorm", mlp_type="swiglu", mlp_bias=False, qk_norm=False)
ARCHITECTURES = {"new": NEW, "v1": V1, "v2": V2, "plain": PLAIN}

PROMPTS = (
    "what is your name?",
    "hello 🙂 how are you?",
    "日本語で話せますか？",
    "def f(x):\n    return x + 1\n",
    "a\n\nb\n",
    "Привет, мир",
    "1 + 1 =",
    "❤️🇩🇪👩‍👩‍👧",
    "你好，世界",
    "for i in range(10):\n\tprint(i)\n",
    "tell me a joke",
    "  leading blanks",
    "trailing \n",
    "<s>struck</s> <0x0A>",
    "cafe\u0301",
    "import os\r\nimport sys\r\n",
    "𝔘𝔫𝔦",
    "",
    "\x00\x7f\u200b",
    "x",
)


def varied(arch: Architecture, V: int, T: int = 192) -> GPT:
    """A model of random weights whose outputs depend on all of them."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(V=V, T=T, C=64, L=2, H=4, d_ff=96, dropout=0.1, rope_theta=10000.0), arch).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save(path: Path, arch: Architecture, tokenizer_model: bytes | None, V: int = 512, T: int = 192) -> Path:
    """A checkpoint with its tokenizer inside, or of bytes if it is None."""
    model = varied(arch, 256 if tokenizer_model is None else V, T)
    sha256 = None if tokenizer_model is None else files.sha256_bytes(tokenizer_model)
    values: dict[str, Any] = {"model_cfg": model.cfg, "model": model, "optimizer": None, "step": 3}
    meta = {"_settings_meta": {"tokenizer_sha256": sha256}}
    save_checkpoint(path, train_cfg=meta, best_val_loss=None, tokenizer_model=tokenizer_model, **values)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
