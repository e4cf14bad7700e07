"""Logits for the next token of one or more sequences whose keys and values share a cache: prefill a row, step rows.

Which machinery computes a step is decided here: on a CPU the native decoder (`native`), on a GPU a captured CUDA graph,
elsewhere plain PyTorch. All of them fill the same cache; prompts always go through `GPT.forward`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt import contention
from niels_gpt.infer.cache import KVCache, cache_for
from niels_gpt.infer.native.decoder import NativeDecoder, decoder_for, is_watched
from niels_gpt.model.blocks import Block
from niels_gpt.model.gpt import GPT, Trace
from niels_gpt.model.rope import rotate


@dataclass(frozen=True)
class Outlook:
    """What the model expects next: logits (V,) float32 on the CPU, their log-sum-exp and their entropy in nats."""

    logits: Tensor
    logsumexp: float
    entropy: float


@dataclass
class Watch:
    """What to record on the way; PyTorch computes what is watched."""

    trace: Trace | None = None
    lens: int = 0  # of how many likeliest tokens per layer
    layers: list[list[tuple[int, float]]] | None = None  # the lens' answer: (id, log-probability) after each block

    @classmethod
    def of(cls, trace_layer: int | None, lens: int) -> Watch | None:
        """A new one for one pass; None if nothing is to be recorded."""
        return (
            cls(None if trace_layer is None else Trace(trace_layer), lens) if trace_layer is not None or lens else None
        )


class Engine:
    """A model with a cache of `rows` sequences of at most T_max positions."""

    def __init__(self, model: GPT, *, rows: int, T_max: int, weights: str = "fp32", native: bool = True) -> None:
        """weights: "fp32", "fp16" or "int8", of the native decoder; a warning says when float32 is used instead."""
        self.model, self.cache = model, cache_for(model, B=rows, T_max=T_max)
        self._weights, self._use_native = weights, native
        self._native: NativeDecoder | None = None
        self._graph: _CapturedStep | None = None

    def refresh(self) -> None:
        """Before a stream: pack the weights, unless they are packed and have not changed since."""
        self._native = None
        if not self._use_native:
            found: NativeDecoder | str = "the native decoder is switched off"
        else:
            found = decoder_for(self.model, self._weights)
        if isinstance(found, NativeDecoder):
            self._native = found
        elif self._weights != "fp32":
            warnings.warn(f"weights stay float32, not {self._weights}: {found}", stacklevel=2)
        if self.cache.k.device.type == "cuda" and self._graph is None:
            self._graph = _CapturedStep(self.model, self.cache)

    def prefill(self, row: int, ids: Sequence[int], start: int, watch: Watch | None = None) -> Outlook:
        """Feed ids at positions start.. of a row; the outlook after the last of them."""
        if len(ids) == 1 and watch is None and (self._native is not None or self._graph is not None):
            return self.step([row], ids, [start])[0]
        return self._pass(row, ids, start, watch)

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> list[Outlook]:
        """Feed one token to each of some rows at its own position; their outlooks in the same order."""
        if self._native is not None:
            found = self._native.step(tokens, positions, self.cache, rows)
            stats = zip(found.logsumexp.tolist(), found.entropy.tolist(), strict=True)
            return [Outlook(x, z, e) for x, (z, e) in zip(found.logits, stats, strict=True)]
        if self._graph is None and len(rows) == 1:
            return [self._pass(rows[0], tokens, positions[0], None)]
        all_tokens, all_positions = [0] * self.cache.B, [0] * self.cache.B
        for row, token, position in zip(rows, tokens, positions, strict=True):
            all_tokens[row], all_positions[row] = token, position
        logits = (self._graph or self._plain)(all_tokens, all_positions, rows)
        return [outlook(logits[row]) for row in rows]

    def share(self, ids: Sequence[int]) -> None:
        """Feed ids at the first positions of every row: read once, copied to all."""
        if ids:
            self._pass(0, ids, 0, None)
            for stored in (self.cache.k, self.cache.v):
                stored[:, 1:, :, : len(ids)] = stored[:, :1, :, : len(ids)]

    def _pass(self, row: int, ids: Sequence[int], start: int, watch: Watch | None) -> Outlook:
        """One pass of PyTorch over ids at positions start.. of a row."""
        contention.look()
        cache = KVCache(self.cache.k[:, row : row + 1], self.cache.v[:, row : row + 1], t=start)
        x = torch.tensor([list(ids)], device=cache.k.device)
        return last_outlook(self.model, x, cache, watch)

    def _plain(self, tokens: list[int], positions: list[int], rows: Sequence[int]) -> Tensor:
        contention.look()
        device, upto = self.cache.k.device, max(positions) + 1
        every = torch.tensor([tokens, positions], device=device)
        live = torch.tensor([row in rows for row in range(self.cache.B)], device=device)
        return ragged_step(self.model, every[0], every[1], live, self.cache.k, self.cache.v, upto).cpu()


def last_outlook(model: GPT, x: Tensor, cache: KVCache | None = None, watch: Watch | None = None) -> Outlook:
    """The outlook after the last position of x (1, T): the head sees that one row only."""
    if cache is not None and watch is None and not is_watched(model):
        h = _last_hidden(model, x, cache)
    elif watch is None or not watch.lens:
        h = model.hidden(x, cache=cache, trace=None if watch is None else watch.trace)
    else:
        with _after_each_block(model) as states:
            h = model.hidden(x, cache=cache, trace=watch.trace)
        logp = model.lm_head(model.ln_f(torch.stack(states))).float().log_softmax(dim=-1)  # (L, V)
        best = logp.topk(min(watch.lens, logp.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        watch.layers = [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return outlook(model.lm_head(h[0, -1]).float().cpu())


def _last_hidden(model: GPT, x: Tensor, cache: KVCache) -> Tensor:
    """`GPT.hidden` of the last position alone, (1, 1, C): of the last block the others need keys and values only.

    A tenth of a prompt's time in a model of eight blocks.
    """
    T, C, start = x.shape[1], model.cfg.C, cache.t
    h = model.tok_emb(x)
    for i in range(model.cfg.L - 1):
        h = model.blocks[i](h, cache.layer(i))
    block = cast(Block, model.blocks[-1])
    attn, normed = block.attn, block.ln1(h)
    H, D = attn.H, attn.D
    q = F.linear(normed[:, -1:], attn.qkv.weight[:C]).view(1, 1, H, D).transpose(1, 2)  # (1, H, 1, D)
    k, v = F.linear(normed, attn.qkv.weight[C:]).view(1, T, 2, H, D).transpose(1, 3).unbind(2)  # each (1, H, T, D)
    sin, cos = attn.rope_sin[:, :, start : start + T], attn.rope_cos[:, :, start : start + T]
    q, k = rotate(attn.q_norm(q), sin[:, :, -1:], cos[:, :, -1:]), rotate(attn.k_norm(k), sin, cos)
    k, v = cache.layer(model.cfg.L - 1).append(k, v)
    y = F.scaled_dot_product_attention(q, k, v)
    h = h[:, -1:] + attn.proj(y.transpose(1, 2).reshape(1, 1, C))
    cache.advance(T)
    return model.ln_f(h + block.mlp(block.ln2(h)))


def outlook(logits: Tensor) -> Outlook:
    """From logits (V,) float32 on the CPU."""
    logp = logits.log_softmax(dim=-1)
    return Outlook(logits, float(logits[0] - logp[0]), -float((logp.exp() * logp).sum()))


@contextmanager
def _after_each_block(model: GPT) -> Iterator[list[Tensor]]:
    """Collects the residual stream (C,) of the last position after each block."""
    states: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _x, h: states.append(h[0, -1])) for b in model.blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def ragged_step(model: GPT, tokens: Tensor, positions: Tensor, live: Tensor, k: Tensor, v: Tensor, upto: int) -> Tensor:
    """One token per row of a cache k, v (L, B, H, T_max, D), each at its own position; float32 logits (B, V).

    tokens, positions: (B,) ids on the cache's device. live: (B,) bool; the other rows' caches stay as they are.
    upto: how many positions any row may see.
    """
    B, L = tokens.shape[0], model.cfg.L
    H, D = k.shape[2], k.shape[4]
    row = torch.arange(B, device=k.device)
    visible = (torch.arange(upto, device=k.device) <= positions[:, None])[:, None, None]  # (B, 1, 1, upto)
    h = model.tok_emb(tokens)
    keep = live[:, None, None]
    for i in range(L):
        block = cast(Block, model.blocks[i])
        attn = block.attn
        q, new_k, new_v = attn.qkv(block.ln1(h)).view(B, 3, H, 1, D).unbind(1)  # each (B, H, 1, D)
        sin, cos = attn.rope_sin[0, 0, positions][:, None, None], attn.rope_cos[0, 0, positions][:, None, None]
        q, new_k = rotate(attn.q_norm(q), sin, cos), rotate(attn.k_norm(new_k), sin, cos)
        k[i][row, :, positions] = torch.where(keep, new_k[:, :, 0].to(k.dtype), k[i][row, :, positions])
        v[i][row, :, positions] = torch.where(keep, new_v[:, :, 0].to(v.dtype), v[i][row, :, positions])
        seen_k, seen_v = k[i, :, :, :upto].to(q.dtype), v[i, :, :, :upto].to(q.dtype)
        y = F.scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=visible)
        h = h + attn.proj(y.reshape(B, H * D))
        h = h + block.mlp(block.ln2(h))
    return model.lm_head(model.ln_f(h)).float()


class _CapturedStep:
    """`ragged_step` as a CUDA graph: one launch per token instead of a hundred."""

    WARM_UP = 3

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._given = torch.zeros(3, cache.B, dtype=torch.long, device=cache.k.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capturable = True
        self._logits = torch.empty(0)

    def __call__(self, tokens: list[int], positions: list[int], rows: Sequence[int]) -> Tensor:
        live = [int(row in rows) for row in range(self._cache.B)]
        self._given.copy_(torch.tensor([tokens, positions, live]))
        if self._graph is not None:
            self._graph.replay()
        elif self._capturable:
            try:
                self._capture()
            except RuntimeError as error:  # a driver or an operator that cannot be captured: slower, not wrong
                self._capturable = False
                warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=2)
        return (self._run() if self._graph is None else self._logits).cpu()

    def _run(self) -> Tensor:
        tokens, positions, live = self._given
        k, v = self._cache.k, self._cache.v
        return ragged_step(self._model, tokens, positions, live.bool(), k, v, self._cache.T_max)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # writing the same positions again changes nothing
            for _ in range(self.WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run()
        graph.replay()
        self._graph = graph


def check_finite(expected: Outlook) -> Outlook:
    """The same; ValueError for logits that are no numbers."""
    if not math.isfinite(expected.entropy):
        raise ValueError("the model gives non-finite logits: its weights are damaged or its training diverged")
    return expected
