"""Several texts at once: every request has its own row of one cache, its own length, sampling and end.

A free row takes the next request, so that rows do not wait for the longest text. Each prompt is read alone, then all
open rows advance together. With the native decoder every request gets exactly the tokens that it gets alone; in plain
PyTorch but for ties in the last bits of float32.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from niels_gpt.infer.engine import Engine, Outlook, check_finite
from niels_gpt.infer.steps import Request, Step, Writer, ban_mask, check_ids, eval_mode
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import Tokenizer


def stream_batch(
    model: GPT,
    requests: Sequence[Request],
    *,
    max_rows: int = 64,
    tokenizer: Tokenizer | None = None,
    top_n: int = 0,
    weights: str = "fp32",
    native: bool = True,
) -> Iterator[tuple[int, Step]]:
    """Yield (index of the request, step) as tokens are written, each request's own in order.

    max_rows: how many texts are open at a time. The other arguments, rolling "half" and the steps are as in
    `stream_steps`. The model is in evaluation mode while the stream is open. ValueError for bad arguments, at once.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, not {max_rows}")
    writers = [Writer(request, model, model.cfg.T, tokenizer) for request in requests]
    waiting = [i for i, writer in enumerate(writers) if writer.left]
    longest = max((len(writers[i].ids) + writers[i].left for i in waiting), default=1)

    def steps() -> Iterator[tuple[int, Step]]:
        engine = Engine(
            model, rows=min(max_rows, len(waiting)), T_max=min(model.cfg.T, longest), weights=weights, native=native
        )
        for expected in _turns(engine, waiting, lambda i: writers[i].view(), lambda i: writers[i].left > 0):
            with torch.inference_mode():
                written = [(i, writers[i].write(outlook, top_n=top_n)) for i, outlook in expected.items()]
            yield from written

    return steps() if waiting else iter(())


def _turns(
    engine: Engine, texts: Iterable[int], view: Callable[[int], list[int]], is_open: Callable[[int], bool]
) -> Iterator[dict[int, Outlook]]:
    """Every turn, what comes next in each of the open texts (index -> outlook); the reader then adds one id to each.

    view: the ids of a text that the model sees. is_open: whether it goes on; if not, its row takes the next text.
    """
    waiting = deque(texts)
    taken: dict[int, int] = {}  # row -> text
    held: dict[int, int] = {}  # row -> positions its cache holds
    with eval_mode(engine.model):
        engine.refresh()
        while True:
            taken = {row: i for row, i in taken.items() if is_open(i)}
            for row in range(engine.cache.B):
                if row not in taken and waiting:
                    taken[row], held[row] = waiting.popleft(), 0
            if not taken:
                return
            with torch.inference_mode():  # never around a yield: the mode would reach whoever reads
                expected = _advance(engine, {row: view(i) for row, i in taken.items()}, held)
            yield {i: expected[row] for row, i in taken.items()}


def _advance(engine: Engine, views: dict[int, list[int]], held: dict[int, int]) -> dict[int, Outlook]:
    """Feed each row what it lacks of its view; updates `held`. Rows that lack one token go together."""
    ready = [row for row, ids in views.items() if held[row] == len(ids) - 1]
    expected: dict[int, Outlook] = {}
    if ready:
        tokens = [views[row][-1] for row in ready]
        outlooks = engine.step(ready, tokens, [held[row] for row in ready])
        expected = dict(zip(ready, outlooks, strict=True))
    for row, ids in views.items():
        if row not in expected:  # new, or rolled on
            expected[row] = engine.prefill(row, ids, 0)
        held[row] = len(ids)
    return expected


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

    A reply ends where the context does. ValueError for prompts that the model cannot read, and when all ids are banned.
    """
    T = model.cfg.T
    texts = [check_ids(model, ids) for ids in prompts]
    left = [min(max_new_tokens, T - len(ids)) for ids in texts]
    if min(left, default=0) < 0:
        raise ValueError(f"a prompt is longer than the {T} positions of the model, or max_new_tokens is below 0")
    waiting = [i for i, n in enumerate(left) if n]
    banned = ban_mask(model.cfg.V, banned_ids)
    if waiting:
        longest = max(len(ids) + n for ids, n in zip(texts, left, strict=True))
        engine = Engine(model, rows=min(max_rows, len(waiting)), T_max=longest)
        for expected in _turns(engine, waiting, texts.__getitem__, lambda i: left[i] > 0):
            logits = torch.stack([check_finite(outlook).logits for outlook in expected.values()])  # (open texts, V)
            best = logits.masked_fill_(banned, -math.inf).argmax(dim=-1).tolist()
            for i, token in zip(expected, best, strict=True):
                texts[i].append(token)
                left[i] = 0 if token in stop_ids else left[i] - 1
    replies = [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]
    return [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in replies]
