"""The likeliest replies to many prompts at once: every prompt has its own row of one cache, its own length and end.

A free row takes the next prompt, so that rows do not wait for the longest reply. What all prompts begin with (a system
prompt) is read once, in one pass; then all open rows advance together, an id at a time, through the rest of their
prompts and their replies. Each prompt gets the reply that it gets alone, but for ties in the last bits of float32.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from niels_gpt.infer.engine import Engine, Outlook, check_finite
from niels_gpt.infer.steps import ban_mask, check_ids, eval_mode
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import Tokenizer


def greedy_replies(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    banned_ids: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
    max_rows: int = 64,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to and without its first stop id, in the order of `prompts`.

    tokenizer: ids that it does not know are never chosen. max_rows: how many texts are open at a time. A reply ends
    where the context does. ValueError for prompts that the model cannot read, and when all ids are banned.
    """
    T = model.cfg.T
    texts = [check_ids(model, ids) for ids in prompts]
    left = [min(max_new_tokens, T - len(ids)) for ids in texts]
    if min(left, default=0) < 0:
        raise ValueError(f"a prompt is longer than the {T} positions of the model, or max_new_tokens is below 0")
    waiting = [i for i, n in enumerate(left) if n]
    banned = ban_mask(model.cfg.V, banned_ids, tokenizer)
    if waiting:
        longest = max(len(texts[i]) + left[i] for i in waiting)
        engine = Engine(model, rows=min(max_rows, len(waiting)), T_max=longest)
        for expected in _turns(engine, {i: texts[i] for i in waiting}, lambda i: left[i] > 0):
            logits = torch.stack([check_finite(outlook).logits for outlook in expected.values()])  # (open texts, V)
            best = logits.masked_fill_(banned, -math.inf).argmax(dim=-1).tolist()
            for i, token in zip(expected, best, strict=True):
                texts[i].append(token)
                left[i] = 0 if token in stop_ids else left[i] - 1
    replies = [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]
    return [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in replies]


def shared_beginning(texts: Sequence[list[int]]) -> list[int]:
    """What all texts begin with, but for at least one id of each."""
    one, other = min(texts), max(texts)
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[: min(same, min(map(len, texts)) - 1)]


def _turns(engine: Engine, texts: dict[int, list[int]], is_open: Callable[[int], bool]) -> Iterator[dict[int, Outlook]]:
    """Every turn, what comes next in each of the open texts (index -> outlook); the reader then adds one id to each.

    is_open: whether a text goes on; if not, its row takes the next one. A text whose prompt is still read is left out.
    """
    waiting, shared = deque(texts), shared_beginning(list(texts.values()))
    taken: dict[int, int] = {}  # row -> text
    held: dict[int, int] = {}  # row -> positions its cache holds
    with eval_mode(engine.model):
        engine.refresh()
        with torch.inference_mode():
            engine.share(shared)
        while True:
            taken = {row: i for row, i in taken.items() if is_open(i)}
            for row in range(engine.cache.B):
                if row not in taken and waiting:
                    taken[row], held[row] = waiting.popleft(), len(shared)
            if not taken:
                return
            with torch.inference_mode():  # never around a yield: the mode would reach whoever reads
                expected = _advance(engine, {row: texts[i] for row, i in taken.items()}, held)
            if expected:
                yield {taken[row]: outlook for row, outlook in expected.items()}


def _advance(engine: Engine, texts: dict[int, list[int]], held: dict[int, int]) -> dict[int, Outlook]:
    """Feed each row the next id that it lacks, all rows together; the outlooks of those that now lack none."""
    rows = list(texts)
    outlooks = engine.step(rows, [texts[row][held[row]] for row in rows], [held[row] for row in rows])
    for row in rows:
        held[row] += 1
    return {row: outlook for row, outlook in zip(rows, outlooks, strict=True) if held[row] == len(texts[row])}
