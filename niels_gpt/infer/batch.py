"""Greedy replies to many prompts at once: prompts of one length share a cache and every forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch

from niels_gpt.infer.cache import cache_for
from niels_gpt.infer.steps import eval_mode
from niels_gpt.model.gpt import GPT


def greedy_replies(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    banned_ids: Collection[int] = (),
    max_rows: int = 64,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and without its first stop id, in the order of `prompts`.

    The same ids as decoding each prompt alone, but for ties in the last bits of float32.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    replies: list[list[int]] = [[] for _ in prompts]
    with eval_mode(model), torch.inference_mode():
        for members in by_length.values():
            for first in range(0, len(members), max_rows):
                rows = members[first : first + max_rows]
                ids = [list(prompts[i]) for i in rows]
                for i, reply in zip(rows, _decode(model, ids, max_new_tokens, stop_ids, banned_ids), strict=True):
                    replies[i] = reply
    return replies


def _decode(
    model: GPT, rows: list[list[int]], max_new_tokens: int, stop_ids: Collection[int], banned_ids: Collection[int]
) -> list[list[int]]:
    room = min(max_new_tokens, model.cfg.T - len(rows[0]))
    cache = cache_for(model, B=len(rows), T_max=len(rows[0]) + room)
    x = torch.tensor(rows, device=cache.k.device)
    replies: list[list[int]] = [[] for _ in rows]
    open_rows = set(range(len(rows)))
    for _ in range(room):
        logits = model.lm_head(model.hidden(x, cache=cache)[:, -1])
        logits[:, list(banned_ids)] = -torch.inf
        x = logits.argmax(dim=-1, keepdim=True)
        for row, token_id in enumerate(x[:, 0].tolist()):
            if row in open_rows and token_id in stop_ids:
                open_rows.discard(row)
            elif row in open_rows:
                replies[row].append(token_id)
        if not open_rows:
            break
    return replies
