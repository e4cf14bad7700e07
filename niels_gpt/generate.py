"""Generation for callers: ids or text in, ids or text out; thin wrappers over `infer.steps.stream_steps`.

Sampling itself lives in `infer.sampling`, the cached generators of the specification in `infer.kv_cache`, many replies
at once in `infer.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.infer.sampling import Sampling, min_p_filter, sample_next_token, top_k_filter, top_p_filter
from niels_gpt.infer.steps import stream_steps
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import GenerationSettings
from niels_gpt.tokenizer import Tokenizer, get_default_tokenizer

__all__ = [
    "StopText",
    "generate_ids",
    "generate_text",
    "min_p_filter",
    "sample_next_token",
    "top_k_filter",
    "top_p_filter",
]


class StopText:
    """Ends a streamed text before the first stop string, which may arrive in pieces.

    Push pieces, show what comes back; once `found` is set, generate no more. Text that might be the beginning of a stop
    string is held back until it is decided; `flush` at the end returns what is left.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        self.found = bool(starts)
        keep = min(starts) if starts else len(text) - self._undecided(text)
        self._held = "" if self.found else text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, now that no more will come."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)


def generate_ids(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    T: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    min_p: float | None = None,
    eot_id: int | None = None,
    banned_token_ids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompt and new ids as a 1-D int64 tensor on the CPU; the model sees the last T ids at every token.

    Stops at eot_id, which is not in the result. device: where the model is (checked when given).
    generator: a CPU generator, so that a seed means the same on every device.
    """
    _check_device(model, device)
    ids = [int(i) for i in prompt_ids]
    for step in stream_steps(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, repetition_penalty, min_p),
        generator=generator,
        stop_ids=() if eot_id is None else (eot_id,),
        banned_ids=banned_token_ids or (),
        context=T,
        rolling="slide",
    ):
        if step.token_id != eot_id:
            ids.append(step.token_id)
    return torch.tensor(ids)


def generate_text(
    model: GPT,
    prompt_text: str,
    *,
    cfg: ModelConfig,
    generation: GenerationSettings,
    stop_token_id: int | None = None,
    banned_token_ids: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Tokenizer | None = None,
    text_stops: Sequence[str] = (),
) -> str:
    """The prompt and its continuation as text, with the resolved generation settings (default tokenizer if none).

    It ends before stop_token_id, or before the first of text_stops: the turns of byte models have no ids of their own.
    """
    _check_device(model, device)
    tokenizer = get_default_tokenizer() if tokenizer is None else tokenizer
    ids, stop, said = tokenizer.encode(prompt_text), StopText(text_stops), ""
    for step in stream_steps(
        model,
        list(ids),
        max_new_tokens=generation.max_new_tokens,
        sampling=Sampling.of(generation),
        generator=generator,
        stop_ids=() if stop_token_id is None else (stop_token_id,),
        banned_ids=banned_token_ids or (),
        tokenizer=tokenizer,
        context=cfg.T,
        rolling="slide",
        weights=generation.weights,
        native=generation.native_decoder,
    ):
        if step.token_id != stop_token_id:
            ids.append(step.token_id)
        said += stop.push(step.text)
        if stop.found:
            break
    return prompt_text + said + stop.flush() if text_stops else tokenizer.decode(ids)


def _check_device(model: GPT, device: torch.device | str | None) -> None:
    here = model.tok_emb.weight.device
    if device is not None and torch.device(device).type != here.type:
        raise ValueError(f"the model is on {here.type}, not on {device}; move it first with model.to({str(device)!r})")
