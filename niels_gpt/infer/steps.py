"""Generation as a stream of documented steps: prefill once, then one position per token.

It knows ids, a model and (for text) a tokenizer; no chat, no files. Everything that generates goes through
`stream_steps`, but for `batch.greedy_replies`, which answers many prompts at once. The oracle that `stream_steps` is
tested against is `kv_cache.generate_ids_greedy_full`.

When the context is full, rolling "half" (the default) starts again from the last half of the window, so a long text
costs one short prefill per half window. Rolling "slide" keeps the last `context` ids at every token instead: more
context, and a full forward pass per token, as without a cache. Until the context is full all are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from niels_gpt.infer.engine import Engine, Outlook, Watch, check_finite, last_outlook
from niels_gpt.infer.sampling import Chooser, Sampling, likeliest
from niels_gpt.model.gpt import GPT, Trace
from niels_gpt.tokenizer import TextStream, Tokenizer

Rolling = Literal["half", "slide"]
Alternatives = list[tuple[int, float]]  # (id, log-probability in nats), best first


@dataclass(frozen=True)
class Step:
    """One generated token, and what the model thought: its own distribution, before bans, penalties and filters."""

    token_id: int
    text: str  # what it adds to the text, always whole characters; a stop token adds none of its own
    logprob: float  # nats
    entropy: float  # nats
    top: Alternatives  # the top_n likeliest
    attn_row: Tensor | None  # (H, positions) of the traced layer: where the query that chose this token looked
    sampled: Alternatives = field(default_factory=list)  # the top_n of what was drawn from: after all of `Sampling`
    lens: list[Alternatives] | None = None  # logit lens: the lens_n likeliest if the model ended after each block


@dataclass(frozen=True)
class Request:
    """One text to write. ValueError from the streams that read it for values that make no sense."""

    prompt_ids: Sequence[int] | Tensor  # list or 1-D tensor, at least one id; of more than the context, the end is read
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator | None = None  # on the CPU, so that a seed means the same on every device
    stop_ids: Collection[int] = frozenset()  # the text ends after one of these, which is yielded too
    banned_ids: Collection[int] = ()  # never chosen


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards the mode of before, whatever happened.

    Blocks that are compiled for training run as they are meanwhile: every new shape would be compiled anew.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if getattr(model, "compiled", False) else nullcontext():
            yield
    finally:
        model.train(was_training)


class Memory:
    """A cache that outlives a stream: the next one feeds only what its prompt does not share with what is stored.

    For a chat: each turn begins with all turns before it. The stored keys and values belong to the model's weights at
    the time; after training it, use a new one.
    """

    def __init__(self, model: GPT, *, context: int | None = None, weights: str = "fp32", native: bool = True) -> None:
        """context: positions to keep (default: all the model has). weights, native: as `Engine`."""
        T_max = model.cfg.T if context is None else context
        self.engine = Engine(model, rows=1, T_max=T_max, weights=weights, native=native)
        self.fed = 0  # tokens that went through the model so far
        self._ids: list[int] = []  # what the cache holds, from position 0

    @property
    def context(self) -> int:
        """Positions that there is room for."""
        return self.engine.cache.T_max

    def begin(self, ids: list[int]) -> None:
        """A new stream: keep what ids share with what is stored, all but the last of them."""
        most = min(len(self._ids), len(ids) - 1)
        if self._ids[:most] != ids[:most]:
            most = next(i for i in range(most) if self._ids[i] != ids[i])
        self._ids = self._ids[:most]
        self.engine.refresh()

    def outlook(self, ids: list[int], watch: Watch | None) -> Outlook:
        """After ids (at most `context`), feeding what follows what is stored; all of them after a roll."""
        known = len(self._ids) if len(self._ids) < len(ids) and self._ids == ids[: len(self._ids)] else 0
        fresh = ids[known:]
        self._ids = ids[:known]  # if the pass fails, no more than this is certain
        found = self.engine.prefill(0, fresh, known, watch)
        self._ids = ids
        self.fed += len(fresh)
        return found


class Writer:
    """The state of one text while it is being written: its ids, the window the model sees, and what chooses."""

    def __init__(self, request: Request, model: GPT, context: int, tokenizer: Tokenizer | None = None) -> None:
        """ValueError for a request that makes no sense."""
        if request.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, not {request.max_new_tokens}")
        self.ids = check_ids(model, request.prompt_ids)
        self.left = request.max_new_tokens
        self._context, self._stop_ids = context, request.stop_ids
        banned = ban_mask(model.cfg.V, request.banned_ids, tokenizer)
        self._chooser = Chooser(request.sampling, self.ids, banned, request.generator)
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._begin = max(0, len(self.ids) - context)

    @property
    def is_full(self) -> bool:
        """Whether there are more ids than the model may see."""
        return len(self.ids) > self._context

    def window(self) -> list[int]:
        """The ids that the model sees of a sliding window: the last of them."""
        return self.ids[-self._context :]

    def view(self) -> list[int]:
        """The ids that the model sees from a cache: all since the last roll."""
        if len(self.ids) - self._begin > self._context:
            self._begin = len(self.ids) - max(1, self._context // 2)
        return self.ids[self._begin :]

    def write(self, expected: Outlook, *, top_n: int = 0, watch: Watch | None = None) -> Step:
        """Choose the next token; `left` is 0 after the last one."""
        check_finite(expected)
        logits = expected.logits
        token_id, sampled = self._chooser.choose(logits, top_n)
        self.ids.append(token_id)
        stops = token_id in self._stop_ids
        self.left = 0 if stops else self.left - 1
        piece = "" if self._text is None or stops else self._text.push(token_id)
        if self._text is not None and not self.left:
            piece += self._text.flush()
        top = likeliest(logits - expected.logsumexp, top_n) if top_n else []
        row = _row(watch.trace) if watch is not None and watch.trace is not None else None
        layers = None if watch is None else watch.layers
        logprob = float(logits[token_id]) - expected.logsumexp
        return Step(token_id, piece, logprob, expected.entropy, top, row, sampled, layers)


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
    lens_n: int = 0,
    use_cache: bool = True,
    context: int | None = None,
    rolling: Rolling = "half",
    memory: Memory | None = None,
    weights: str = "fp32",
    native: bool = True,
) -> Iterator[Step]:
    """Yield up to max_new_tokens steps; the stream ends after a token of `stop_ids`, which is yielded too.

    The first seven arguments as in `Request`; ids that `tokenizer` does not know are never chosen either.
    trace_layer: record that layer's attention in each step. top_n: how many alternatives a step lists. lens_n: how many
    tokens the logit lens lists per layer. context: positions the model may see (default: all it has).
    memory: goes on from what it holds and keeps what is read; otherwise `weights` and `native` are as in `Engine`.
    The model is in evaluation mode while the stream is open. Raises ValueError for bad arguments, at once.
    """
    context = _check_watch(model, context, trace_layer, top_n, lens_n)
    if memory is not None:
        if memory.engine.model is not model:
            raise ValueError("the memory belongs to another model")
        context = min(context, memory.context)
    request = Request(prompt_ids, max_new_tokens, sampling, generator, stop_ids, banned_ids)
    writer = Writer(request, model, context, tokenizer)
    if memory is None and use_cache:
        window = min(context, len(writer.ids) + max_new_tokens)
        unwatched = Watch.of(trace_layer, lens_n) is None
        memory = Memory(model, context=window, weights=weights, native=native and unwatched)
    return _written(
        model, writer, memory, slide=rolling == "slide", trace_layer=trace_layer, top_n=top_n, lens_n=lens_n
    )


def _written(
    model: GPT,
    writer: Writer,
    memory: Memory | None,
    *,
    slide: bool,
    trace_layer: int | None,
    top_n: int,
    lens_n: int,
) -> Iterator[Step]:
    """The steps of one text to its end. Without a memory, or where the window slides, each pass reads all of it."""
    with eval_mode(model):
        if memory is not None and writer.left:
            memory.begin(writer.view())
        while writer.left:
            watch = Watch.of(trace_layer, lens_n)
            with torch.inference_mode():  # never around a yield: the mode would reach whoever reads the stream
                if memory is None or (slide and writer.is_full):
                    x = torch.tensor([writer.window()], device=model.tok_emb.weight.device)
                    expected = last_outlook(model, x, watch=watch)
                else:
                    expected = memory.outlook(writer.view(), watch)
                step = writer.write(expected, top_n=top_n, watch=watch)
            yield step


def _check_watch(model: GPT, context: int | None, trace_layer: int | None, top_n: int, lens_n: int) -> int:
    """The context to use; ValueError for arguments out of range."""
    context = model.cfg.T if context is None else context
    if not 1 <= context <= model.cfg.T:
        raise ValueError(f"context must be between 1 and the model's {model.cfg.T} positions, not {context}")
    if trace_layer is not None and not 0 <= trace_layer < model.cfg.L:
        raise ValueError(f"trace_layer {trace_layer} is out of range: the model has layers 0..{model.cfg.L - 1}")
    if min(top_n, lens_n) < 0:
        raise ValueError(f"top_n and lens_n must be >= 0, not {min(top_n, lens_n)}")
    return context


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


def ban_mask(V: int, banned_ids: Collection[int], tokenizer: Tokenizer | None = None) -> Tensor:
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


def _row(trace: Trace) -> Tensor | None:
    # A copy: the row is a view that would keep a whole prompt's attention map alive.
    return None if trace.attn_row is None else trace.attn_row[0].float().cpu().clone()
