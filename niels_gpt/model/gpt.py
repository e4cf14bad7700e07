"""The model: a decoder-only transformer with one forward for training, prefill, decoding and tracing.

It knows tensors only: no text, no sampling, no files. `infer.kv_cache` gives it a cache, `train.step` gives it targets.
On CPUs `infer.native.decoder` computes the same forward for single tokens, from this model's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from niels_gpt.config import NEW, Architecture, ModelConfig
from niels_gpt.model.blocks import Block, Dropout, build_norm
from niels_gpt.model.loss import IGNORED, cross_entropy_sum

INIT_STD = 0.02


class LayerCache(Protocol):
    """One layer's keys and values, as attention sees them."""

    @property
    def t(self) -> int: ...  # positions already stored

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) after the first t positions; return everything stored, (B, H, t + T, D)."""
        ...


class ModelCache(Protocol):
    """What `GPT.forward` needs of a cache: the layers, and to be told how far it has come."""

    @property
    def t(self) -> int: ...

    def layer(self, index: int) -> LayerCache: ...

    def advance(self, T: int) -> None: ...


@dataclass
class Trace:
    """Asks one layer for its attention probabilities, recorded before dropout."""

    layer: int
    full: bool = False  # keep the whole (B, H, T, T_total) map, not only the last query's row
    attn_row: Tensor | None = None  # (B, H, T_total)
    attn_full: Tensor | None = None

    def record(self, probs: Tensor) -> None:
        """Keep what was asked for of the probabilities (B, H, T, T_total) of this layer."""
        self.attn_row = probs[:, :, -1].detach()
        self.attn_full = probs.detach() if self.full else None


class GPT(nn.Module):
    """tok_emb -> L blocks -> ln_f -> lm_head (tied to tok_emb)."""

    def __init__(self, cfg: ModelConfig, arch: Architecture = NEW) -> None:
        super().__init__()
        self.cfg, self.arch = cfg, arch
        self.activation_checkpointing = False
        self.compiled = False  # the blocks are, for training; evaluation and generation run them as they are
        self.tok_emb = nn.Embedding(cfg.V, cfg.C)
        self.drop = Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, arch) for _ in range(cfg.L))
        self.ln_f = build_norm(arch, cfg.C)
        self.lm_head = nn.Linear(cfg.C, cfg.V, bias=False)
        self.lm_head.weight = self.tok_emb.weight
        self.init_weights()

    def init_weights(self) -> None:
        """normal(0, 0.02) for matrices, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=INIT_STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have `torch.compile` fuse each block's small operations from its next call on; names of weights stay.

        All blocks are one program, compiled once (docs/log.md has the seconds), where compiling the whole model unrolls
        them. The cross-entropy stays as it is: it is written out already.
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(backend=backend)

    def leave_blocks_eager(self) -> None:
        """Undo `compile_blocks`."""
        self.compiled = False
        for block in self.blocks:
            block._compiled_call_impl = None

    @property
    def num_parameters(self) -> int:
        """Distinct parameters (the tied matrix counts once)."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        apart: Tensor | None = None,
        segment: Tensor | None = None,
        cache: ModelCache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Ids (B, T) -> float32 logits (B, T, V); with targets y -> summed cross-entropy in nats (0-d).

        y: (B, T), -100 ignored. apart: (B, T), those targets whose nats are wanted by themselves too: the result is
        then (2,). segment: (B, T), positions of different segments do not see each other (packed rows).
        cache: read and extended by T positions. trace: which layer's attention to record.
        """
        h = self.hidden(x, segment=segment, cache=cache, trace=trace)
        if y is None:
            return self.lm_head(h).float()
        rows, weight = h.flatten(0, 1), self.lm_head.weight
        total = cross_entropy_sum(rows, weight, y.flatten())
        if apart is None:
            return total
        chosen = apart.flatten() != IGNORED
        return torch.stack((total, cross_entropy_sum(rows[chosen], weight, apart.flatten()[chosen])))

    def hidden(
        self, x: Tensor, *, segment: Tensor | None = None, cache: ModelCache | None = None, trace: Trace | None = None
    ) -> Tensor:
        """Ids (B, T) -> final normed hidden states (B, T, C); arguments as in `forward`."""
        assert x.ndim == 2, f"ids must be (B, T), got {tuple(x.shape)}"
        start = cache.t if cache is not None else 0
        assert start + x.shape[1] <= self.cfg.T, f"{start + x.shape[1]} positions exceed the context of {self.cfg.T}"
        if trace is not None and not 0 <= trace.layer < self.cfg.L:
            raise ValueError(f"trace_layer {trace.layer} is out of range: the model has layers 0..{self.cfg.L - 1}")
        mask = None if segment is None else segment_mask(segment)
        first = None if segment is None or mask is None else first_seen(segment, mask)
        h = self.drop(self.tok_emb(x))
        for i, block in enumerate(self.blocks):
            layer_cache = cache.layer(i) if cache is not None else None
            layer_trace = trace if trace is not None and trace.layer == i else None
            if self.activation_checkpointing and self.training and cache is None:
                h = checkpoint(block, h, None, layer_trace, mask, first, use_reentrant=False)
            else:
                h = block(h, layer_cache, layer_trace, mask, first)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.ln_f(h)

    def forward_with_attn_trace(
        self, x: Tensor, *, trace_layer: int, return_full_attn: bool = False
    ) -> tuple[Tensor, dict[str, int | Tensor | None]]:
        """Logits and {"layer", "attn_row" (B, H, T) of the last query, "attn_full" (B, H, T, T) or None}."""
        trace = Trace(trace_layer, full=return_full_attn)
        logits = self(x, trace=trace)
        return logits, {"layer": trace_layer, "attn_row": trace.attn_row, "attn_full": trace.attn_full}


def segment_mask(segment: Tensor) -> Tensor:
    """(B, T) segment numbers -> (B, 1, T, T) bool: causal, and only within one's own segment."""
    T = segment.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segment.device).tril()
    return (segment[:, None, :, None] == segment[:, None, None, :]) & causal


def first_seen(segment: Tensor, mask: Tensor) -> Tensor | None:
    """(B, T) int32: the first position that each sees by `segment_mask`; None where that is not all from there on.

    On GPUs None as well: nobody asks for it there, and the check would make them wait.
    """
    if segment.device.type != "cpu":
        return None
    position = torch.arange(segment.shape[1])
    begins = torch.ones_like(segment, dtype=torch.bool)
    begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
    first = torch.where(begins, position, 0).cummax(dim=1).values
    in_one_piece = torch.equal(mask.sum(dim=-1)[:, 0], position + 1 - first)
    return first.int() if in_one_piece else None
