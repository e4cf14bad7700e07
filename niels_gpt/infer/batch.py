"""Several texts at once: every request has its own row of one cache, its own length, sampling and end.

A free row takes the next request, so that rows do not wait for the longest text. Each prompt is read alone, then all
open rows advance together. With the native decoder every request gets exactly the tokens that it gets alone; in plain
PyTorch but for ties in the last bits of float32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import torch

from niels_gpt.infer.engine import Engine, Outlook
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import Request, Step, Writer, eval_mode
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import Tokenizer

GREEDY = Sampling(0.0)


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
    waiting = deque(i for i, writer in enumerate(writers) if writer.left)
    longest = max((len(writers[i].ids) + writers[i].left for i in waiting), default=1)

    def steps() -> Iterator[tuple[int, Step]]:
        if not waiting:
            return
        with eval_mode(model):
            rows = min(max_rows, len(waiting))
            engine = Engine(model, rows=rows, T_max=min(model.cfg.T, longest), weights=weights, native=native)
            engine.refresh()
            taken: dict[int, int] = {}  # row -> request
            held: dict[int, int] = {}  # row -> positions its cache holds
            while waiting or taken:
                for row in range(rows):
                    if row not in taken and waiting:
                        taken[row], held[row] = waiting.popleft(), 0
                with torch.inference_mode():
                    expected = _advance(engine, {row: writers[i].view() for row, i in taken.items()}, held)
                    written = [(i, row, writers[i].write(expected[row], top_n=top_n)) for row, i in taken.items()]
                for i, row, step in written:
                    if not writers[i].left:
                        del taken[row]
                    yield i, step

    return steps()


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

    A reply ends where the context does.
    """
    T = model.cfg.T
    requests = [
        Request(ids, min(max_new_tokens, T - len(ids)), GREEDY, stop_ids=stop_ids, banned_ids=banned_ids)
        for ids in prompts
    ]
    replies: list[list[int]] = [[] for _ in prompts]
    for i, step in stream_batch(model, requests, max_rows=max_rows):
        if step.token_id not in stop_ids:
            replies[i].append(step.token_id)
    return replies
