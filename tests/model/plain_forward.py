"""The model's equations written down once more, apart from the package: plain tensor operations, no modules.

Follows the compatibility sheet of the published checkpoints, and Qwen3's definition of QK-norm for new models.
"""

import math

import torch
from torch import Tensor

EPS = 1e-5


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    return scaled if bias is None else scaled + bias


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotate pair (2j, 2j+1) of position t by t * theta^(-2j/D), number by number."""
    turned = torch.empty_like(x)
    for t in range(x.shape[-2]):
        for j in range(x.shape[-1] // 2):
            angle = t * theta ** (-2 * j / x.shape[-1])
            even, odd = x[..., t, 2 * j], x[..., t, 2 * j + 1]
            turned[..., t, 2 * j] = even * math.cos(angle) - odd * math.sin(angle)
            turned[..., t, 2 * j + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return turned


def plain_forward(
    state: dict[str, Tensor], ids: Tensor, *, L: int, H: int, theta: float
) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, T, V) and each layer's attention (B, H, T, T), from a state dict of any generation."""
    h, maps = state["tok_emb.weight"][ids], []
    B, T, C = h.shape
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(L):
        block = f"blocks.{i}"
        u = linear(norm(h, state, f"{block}.ln1"), state, f"{block}.attn.qkv")
        q, k, v = (part.reshape(B, T, H, C // H).transpose(1, 2) for part in u.split(C, dim=-1))
        if f"{block}.attn.q_norm.weight" in state:
            q, k = norm(q, state, f"{block}.attn.q_norm"), norm(k, state, f"{block}.attn.k_norm")
        scores = turn(q, theta) @ turn(k, theta).mT / math.sqrt(C // H)
        maps.append(torch.softmax(scores.masked_fill(future, torch.finfo(scores.dtype).min), dim=-1))
        h = h + linear((maps[-1] @ v).transpose(1, 2).reshape(B, T, C), state, f"{block}.attn.proj")
        u, mlp = norm(h, state, f"{block}.ln2"), f"{block}.mlp"
        if f"{mlp}.fc1.weight" in state:
            a = linear(u, state, f"{mlp}.fc1")
            h = h + linear(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))), state, f"{mlp}.fc2")
        else:
            g, a = linear(u, state, f"{mlp}.fc_g"), linear(u, state, f"{mlp}.fc_a")
            h = h + linear(g * torch.sigmoid(g) * a, state, f"{mlp}.fc_out")
    return norm(h, state, "ln_f") @ state["tok_emb.weight"].T, maps
