"""Inference with a key-value cache: the public face of `infer`.

`prefill` and `decode_step` are views of `GPT.forward`; the cached generators are thin wrappers over `stream_steps`;
`generate_ids_greedy_full` is the slow oracle that all of it is tested against. All of them return the end-of-text
token when it was generated; who renders text leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from niels_gpt.infer.cache import KVCache, allocate_kv_cache
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import check_ids, eval_mode, stream_steps
from niels_gpt.model.gpt import GPT, Trace

__all__ = [
    "KVCache",
    "allocate_kv_cache",
    "decode_step",
    "generate_ids_cached",
    "generate_ids_greedy_cached",
    "generate_ids_greedy_full",
    "prefill",
]

AttnTrace = dict[str, Any]  # {"layer": int, "attn_row": (B, H, positions)}


def prefill(
    model: GPT, prompt_ids: Tensor, cache: KVCache, *, trace_layer: int | None = None, return_attn_row: bool = False
) -> tuple[Tensor, KVCache, AttnTrace | None]:
    """Feed whole prompts (B, t0) into an empty cache; returns (logits (B, t0, V), cache, trace).

    The trace is there if trace_layer is given and return_attn_row is set: that layer's row of the last query.
    AssertionError for a cache that is not empty, does not fit the model or the batch, or is too short.
    """
    assert cache.t == 0, f"prefill needs an empty cache, this one holds {cache.t} positions"
    return _extend(model, prompt_ids, cache, trace_layer if return_attn_row else None)


def decode_step(
    model: GPT, last_token_ids: Tensor, cache: KVCache, *, trace_layer: int | None = None, return_attn_row: bool = False
) -> tuple[Tensor, KVCache, AttnTrace | None]:
    """Feed the newest tokens (B, 1) and append them to the cache; returns (logits (B, 1, V), cache, trace)."""
    assert last_token_ids.ndim == 2 and last_token_ids.shape[1] == 1, (
        f"decode_step takes one token per row, (B, 1), got {tuple(last_token_ids.shape)}"
    )
    return _extend(model, last_token_ids, cache, trace_layer if return_attn_row else None)


@torch.no_grad()
def _extend(model: GPT, x: Tensor, cache: KVCache, trace_layer: int | None) -> tuple[Tensor, KVCache, AttnTrace | None]:
    assert x.ndim == 2 and x.shape[1] > 0, f"ids must be (B, T) with T > 0, got {tuple(x.shape)}"
    L, B, H, T_max, D = cache.k.shape
    fits = (model.cfg.L, x.shape[0], model.cfg.H, model.cfg.C // model.cfg.H)
    assert fits == (L, B, H, D), f"the cache has (L, B, H, D) = {(L, B, H, D)}, model and ids need {fits}"
    assert cache.t + x.shape[1] <= T_max, f"{cache.t} + {x.shape[1]} positions exceed the cache's T_max of {T_max}"
    trace = None if trace_layer is None else Trace(trace_layer)
    with eval_mode(model):
        logits = model(x, cache=cache, trace=trace)
    return logits, cache, None if trace is None else {"layer": trace.layer, "attn_row": trace.attn_row}


def generate_ids_cached(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    eot_token_id: int | None,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    min_p: float | None = None,
    banned_token_ids: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    trace_layer: int | None = None,
) -> dict[str, Any]:
    """Sample with the cache; returns {"ids": prompt and new ids, "steps": [{"token_id", "attn_row"}]}.

    attn_row: the traced layer's H lists of attention from the query that chose the token (None without trace_layer);
    those of the i-th new token cover len(prompt) + i positions. ValueError if everything would exceed the context.
    """
    ids = _check_capacity(model, prompt_ids, max_new_tokens)
    steps = list(
        stream_steps(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, repetition_penalty, min_p),
            generator=generator,
            stop_ids=() if eot_token_id is None else (eot_token_id,),
            banned_ids=banned_token_ids or (),
            trace_layer=trace_layer,
        )
    )
    return {
        "ids": ids + [s.token_id for s in steps],
        "steps": [
            {"token_id": s.token_id, "attn_row": None if s.attn_row is None else s.attn_row.tolist()} for s in steps
        ],
    }


def generate_ids_greedy_cached(
    model: GPT, prompt_ids: Sequence[int] | Tensor, *, max_new_tokens: int, eot_token_id: int | None
) -> list[int]:
    """Always the likeliest token, with the cache; returns prompt and new ids. ValueError as `generate_ids_cached`."""
    return generate_ids_cached(
        model, prompt_ids, max_new_tokens=max_new_tokens, eot_token_id=eot_token_id, temperature=0
    )["ids"]


@torch.no_grad()
def generate_ids_greedy_full(
    model: GPT, prompt_ids: Sequence[int] | Tensor, *, max_new_tokens: int, eot_token_id: int | None
) -> list[int]:
    """The oracle: always the likeliest token, by a full forward pass over everything each time; no cache, no cropping.

    Returns prompt and new ids. ValueError as `generate_ids_cached`.
    """
    ids = _check_capacity(model, prompt_ids, max_new_tokens)
    with eval_mode(model):
        for _ in range(max_new_tokens):
            logits = model(torch.tensor([ids], device=model.tok_emb.weight.device))
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == eot_token_id:
                break
    return ids


def _check_capacity(model: GPT, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int) -> list[int]:
    """The prompt as a fresh list; ValueError if prompt and new tokens would not fit the context."""
    ids = check_ids(model, prompt_ids)
    if len(ids) + max_new_tokens > model.cfg.T:
        raise ValueError(
            f"prompt ({len(ids)} tokens) + max_new_tokens ({max_new_tokens}) exceeds T_max = {model.cfg.T}: "
            "shorten the prompt or ask for fewer tokens"
        )
    return ids
