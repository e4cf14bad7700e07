"""The training steps that `bench_train.py` puts beside ours: other libraries, and two plain models written here.

Every step is forward, backward, clipping, update and zeroing of gradients, under autocast where the precision is bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niels_gpt.model.loss import rows_at_once
from niels_gpt.settings import default_settings
from tools.bench_common import hugging_face_twin

# Hardly moves: at a real rate the one batch is learnt by heart, and denormal gradients slow a step to a tenth.
RATE = 1e-6
Shape = Mapping[str, int]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A step to be timed, and what its figures are computed from."""

    step: Callable[[], Any]
    matmul_parameters: int


def matmul_parameters(model: nn.Module, *, positions: str = "wpe") -> int:
    """Parameters that multiply every token: all matrices (a tied head once), but not a table of positions."""
    matrices = {id(p): p.numel() for name, p in model.named_parameters() if p.ndim == 2 and positions not in name}
    return sum(matrices.values())


def training_step(
    model: nn.Module, loss_of: Loss, x: Tensor, y: Tensor, precision: str, *, fused: bool = True
) -> Candidate:
    """The step of a peer with AdamW at our defaults, but for the learning rate."""
    ours = default_settings().training.pretrain
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=ours.betas, weight_decay=ours.weight_decay, fused=fused or None
    )

    def step() -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), ours.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Candidate(step, matmul_parameters(model))


def transformers_step(shape: Shape, precision: str, x: Tensor, y: Tensor, *, family: str, compiled: bool) -> Candidate:
    """LlamaForCausalLM or Qwen3ForCausalLM with sdpa; Qwen3 is the architecture of our new models."""
    model = hugging_face_twin(shape, family).to(x.device).train()
    labels = torch.cat([x[:, :1], y[:, :-1]], dim=1)  # transformers shifts by itself
    forward = torch.compile(model) if compiled else model
    return training_step(model, lambda x, _: forward(input_ids=x, labels=labels, use_cache=False).loss, x, y, precision)


def litgpt_step(shape: Shape, precision: str, x: Tensor, y: Tensor) -> Candidate:
    """litgpt's GPT in Llama's configuration, head tied as ours."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=shape["T"],
        n_layer=shape["L"],
        n_embd=shape["C"],
        n_head=shape["H"],
        vocab_size=shape["V"],
        padded_vocab_size=shape["V"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["d_ff"],
    )
    model = GPT(config).to(x.device).train()
    model.apply(model._init_weights)  # its own way to begin, as its pretraining does
    model.lm_head.weight = model.transformer.wte.weight
    return training_step(model, lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), x, y, precision)


class NanoBlock(nn.Module):
    """LayerNorm, fused attention, GELU of width 4 C; no biases, no dropout: the fastest form of that shape."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.ln1, self.ln2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class NanoShaped(nn.Module):
    """A model of nanoGPT's shape: learned positions, tied head, cross-entropy of all logits at once."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape["V"], shape["C"]), nn.Embedding(shape["T"], shape["C"])
        self.blocks = nn.ModuleList(NanoBlock(shape["C"], shape["H"]) for _ in range(shape["L"]))
        self.ln_f = nn.LayerNorm(shape["C"], bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy((self.ln_f(h) @ self.wte.weight.t()).flatten(0, 1), y.flatten())


def nano_step(shape: Shape, precision: str, x: Tensor, y: Tensor, *, compiled: bool) -> Candidate:
    model = NanoShaped(shape).to(x.device).train()
    return training_step(model, torch.compile(model) if compiled else model, x, y, precision)


class PlainNorm(nn.Module):
    """RMSNorm written as its formula."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class PlainBlock(nn.Module):
    """Attention with its (T, T) probabilities in memory and dropout on them; SwiGLU with biases; rotary pairs."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        C, T, self.H = shape["C"], shape["T"], shape["H"]
        D = C // self.H
        self.ln1, self.ln2 = PlainNorm(C), PlainNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(C, shape["d_ff"]), nn.Linear(C, shape["d_ff"]), nn.Linear(shape["d_ff"], C)
        )  # fmt: skip
        self.drop = nn.Dropout(dropout)
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("seen", torch.ones(T, T, dtype=torch.bool).tril())

    def turn(self, x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        sin, cos = self.sin[: x.shape[-2]], self.cos[: x.shape[-2]]  # type: ignore[index]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, dim=2))
        scores = self.turn(q) @ self.turn(k).transpose(-2, -1) / math.sqrt(C // self.H)
        scores = scores.masked_fill(~self.seen[:T, :T], -math.inf)  # type: ignore[index,operator]
        y = self.drop(scores.softmax(dim=-1)) @ v
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))
        h = self.ln2(x)
        return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))


class PlainModel(nn.Module):
    """What a decoder looks like before anyone makes it fast."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.wte, self.drop = nn.Embedding(shape["V"], shape["C"]), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PlainBlock(shape, dropout) for _ in range(shape["L"]))
        self.ln_f = PlainNorm(shape["C"])
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.drop(self.wte(x))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy((self.ln_f(h) @ self.wte.weight.t()).flatten(0, 1), y.flatten())


def plain_step(shape: Shape, precision: str, x: Tensor, y: Tensor, *, rate: float) -> Candidate:
    """rate: the dropout probability, inside attention as well. AdamW is PyTorch's default."""
    model = PlainModel(shape, rate).to(x.device).train()
    return training_step(model, model, x, y, precision, fused=False)


def products_step(shape: Shape, precision: str, x: Tensor, y: Tensor) -> Candidate:
    """No model: the matrix products of our step and nothing else, which no step made of them can outrun."""
    V, C, L, d_ff = (shape[key] for key in ("V", "C", "L", "d_ff"))
    rows = {"device": x.device, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    matrices = [(V, C), *[(3 * C, C), (C, C), (d_ff, C), (d_ff, C), (C, d_ff)] * L]
    weights = [torch.randn(*size, **rows) for size in matrices]
    inputs = {width: torch.randn(x.numel(), width, **rows) for width in {C, d_ff}}
    chunk = rows_at_once(V, x.device.type)

    def step() -> None:
        for w in weights:
            h = inputs[w.shape[1]]
            for part in h.split(chunk if w.shape[0] == V else len(h)):
                out = part @ w.t()
                out @ w, out.t() @ part

    return Candidate(step, sum(w.numel() for w in weights))
