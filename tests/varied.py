"""Small models whose output varies.

An untrained tied model repeats its input, which hides nearly every bug of a generator; scaled up matrices make it talk.
"""

from __future__ import annotations

import torch

from niels_gpt.config import NEW, V1, V2, Architecture, ModelConfig
from niels_gpt.model.gpt import GPT

GENERATIONS = {"v1": V1, "v2": V2, "new": NEW}


def varied_model(
    arch: Architecture = NEW,
    *,
    V: int = 61,
    T: int = 32,
    C: int = 24,
    L: int = 2,
    H: int = 2,
    seed: int = 1,
    dropout: float = 0.1,
) -> GPT:
    """An untrained model in evaluation mode: matrices far above the usual 0.02, every vector off its start value."""
    cfg = ModelConfig(V=V, T=T, C=C, L=L, H=H, d_ff=2 * C, dropout=dropout, rope_theta=10000.0)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(cfg, arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the tied matrix comes once, as tok_emb
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * (0.16 if name.startswith("tok_emb") else 0.6))
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def random_ids(n: int, V: int, seed: int = 1) -> list[int]:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def seeded(seed: int = 42) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
