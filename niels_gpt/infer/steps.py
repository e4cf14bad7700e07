"""Generation as a stream of documented steps: prefill once, then one position per token.

It knows ids, a model and (for text) a tokenizer; no chat, no files. Everything that generates goes through
`stream_steps`; the oracle it is tested against is `kv_cache.generate_ids_greedy_full`.

When the context is full the cached stream starts again from the last half of the window, so a long text costs one
short prefill per half window. The uncached stream keeps the last `context` ids at every token instead: more context,
and a full forward pass per token. Until the context is full both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from niels_gpt.infer.cache import cache_for
from niels_gpt.infer.sampling import Chooser, Sampling
from niels_gpt.model.gpt import GPT, Trace
from niels_gpt.tokenizer import TextStream, Tokenizer

NextLogits = Callable[[list[int], Trace | None], Tensor]  # all ids so far -> (V,) float32 on the CPU


@dataclass(frozen=True)
class Step:
    """One generated token, and what the model thought: its own distribution, before bans, penalties and filters."""

    token_id: int
    text: str  # what it adds to the text, always whole characters; a stop token adds none of its own
    logprob: float  # nats
    entropy: float  # nats
    top: list[tuple[int, float]]  # the top_n likeliest (id, logprob), best first
    attn_row: Tensor | None  # (H, positions) of the traced layer: where the query that chose this token looked


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards the mode of before, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def stream_steps(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = frozenset(),
    banned_ids: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
    trace_layer: int | None = None,
    top_n: int = 0,
    use_cache: bool = True,
    context: int | None = None,
) -> Iterator[Step]:
    """Yield up to max_new_tokens steps; the stream ends after a token of `stop_ids`, which is yielded too.

    prompt_ids: list or 1-D tensor, at least one id; of a longer prompt than `context` only the end is read.
    generator: a CPU generator. banned_ids are never chosen, nor are ids that `tokenizer` does not know.
    trace_layer: record that layer's attention in each step. context: positions the model may see (default: all it has).
    The model is in evaluation mode while the stream is open. Raises ValueError for bad arguments, at once.
    """
    V, L = model.cfg.V, model.cfg.L
    ids = check_ids(model, prompt_ids)
    context = model.cfg.T if context is None else context
    if not 1 <= context <= model.cfg.T:
        raise ValueError(f"context must be between 1 and the model's {model.cfg.T} positions, not {context}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, not {max_new_tokens}")
    if trace_layer is not None and not 0 <= trace_layer < L:
        raise ValueError(f"trace_layer {trace_layer} is out of range: the model has layers 0..{L - 1}")
    chooser = Chooser(sampling, ids, _ban_mask(V, banned_ids, tokenizer), generator)
    window = min(context, len(ids) + max_new_tokens)
    next_logits = _cached(model, window) if use_cache else _uncached(model, window)
    text = None if tokenizer is None else TextStream(tokenizer)

    def steps() -> Iterator[Step]:
        with eval_mode(model):
            for left in range(max_new_tokens, 0, -1):
                trace = None if trace_layer is None else Trace(trace_layer)
                with torch.inference_mode():  # never around a yield: the mode would reach whoever reads the stream
                    logits = next_logits(ids, trace)
                    logp, entropy = _distribution(logits)
                    token_id = chooser.choose(logits)
                ids.append(token_id)
                stops = token_id in stop_ids
                piece = "" if text is None or stops else text.push(token_id)
                if text is not None and (stops or left == 1):
                    piece += text.flush()
                row = None if trace is None else _row(trace)
                yield Step(token_id, piece, float(logp[token_id]), entropy, _likeliest(logp, top_n), row)
                if stops:
                    return

    return steps()


def check_ids(model: GPT, ids: Sequence[int] | Tensor) -> list[int]:
    """The prompt as a fresh list; ValueError if it is empty or holds ids that the model does not have."""
    if isinstance(ids, Tensor) and ids.ndim != 1:
        raise ValueError(f"the prompt must be a list or a 1-D tensor of ids, not a tensor of shape {tuple(ids.shape)}")
    plain = [int(i) for i in ids]
    if not plain:
        raise ValueError("the prompt has no tokens; generation needs at least one to start from")
    wrong = next((i for i in plain if not 0 <= i < model.cfg.V), None)
    if wrong is not None:
        raise ValueError(f"prompt id {wrong} is outside the model's vocabulary 0..{model.cfg.V - 1}: wrong tokenizer?")
    return plain


def _cached(model: GPT, window: int) -> NextLogits:
    """Logits after the newest id, feeding only what the cache has not seen."""
    cache = cache_for(model, B=1, T_max=window)
    device = cache.k.device

    def next_logits(ids: list[int], trace: Trace | None) -> Tensor:
        fresh = ids[-1:]
        if cache.t == 0:
            fresh = ids[-window:]
        elif cache.t == window:
            cache.reset()
            fresh = ids[-max(1, window // 2) :]
        return _last_logits(model, torch.tensor([fresh], device=device), cache=cache, trace=trace)

    return next_logits


def _uncached(model: GPT, window: int) -> NextLogits:
    """The same from a full forward pass over the last `window` ids."""
    device = model.tok_emb.weight.device

    def next_logits(ids: list[int], trace: Trace | None) -> Tensor:
        return _last_logits(model, torch.tensor([ids[-window:]], device=device), trace=trace)

    return next_logits


def _last_logits(model: GPT, x: Tensor, **options: object) -> Tensor:
    """Logits (V,) of the last position of x (1, T): the head sees that one row only."""
    h = model.hidden(x, **options)  # type: ignore[arg-type]
    return model.lm_head(h[0, -1]).float().cpu()


def _ban_mask(V: int, banned_ids: Collection[int], tokenizer: Tokenizer | None) -> Tensor:
    """(V,) bool: explicitly banned ids and those past the tokenizer's vocabulary."""
    wrong = [i for i in banned_ids if not 0 <= i < V]
    if wrong:
        raise ValueError(f"banned ids {wrong} are outside the model's vocabulary 0..{V - 1}")
    banned = torch.zeros(V, dtype=torch.bool)
    banned[list(banned_ids)] = True
    if tokenizer is not None:
        banned[tokenizer.vocab_size :] = True
    if bool(banned.all()):
        raise ValueError("every token is banned; nothing could be generated")
    return banned


def _distribution(logits: Tensor) -> tuple[Tensor, float]:
    """(log-probabilities (V,), entropy) of the raw distribution, in nats."""
    logp = logits.log_softmax(dim=-1)
    entropy = -float((logp.exp() * logp).sum())
    if not math.isfinite(entropy):
        raise ValueError("the model gives non-finite logits: its weights are damaged or its training diverged")
    return logp, entropy


def _likeliest(logp: Tensor, n: int) -> list[tuple[int, float]]:
    if n == 0:
        return []
    values, index = logp.topk(min(n, logp.shape[0]))
    return list(zip(index.tolist(), values.tolist(), strict=True))


def _row(trace: Trace) -> Tensor | None:
    # A copy: the row is a view that would keep a whole prompt's attention map alive.
    return None if trace.attn_row is None else trace.attn_row[0].float().cpu().clone()
