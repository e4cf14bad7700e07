"""Measuring a model: loss in nats per token, and bits per byte where tokenizers differ.

Every figure is a sum of nats over a count, never a mean of means. Bits per byte = nats / (ln 2 * UTF-8 bytes of the
text), sentinels left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from niels_gpt.batching import Batch, TokenStream, as_stream, get_batch
from niels_gpt.device import Precision
from niels_gpt.infer.steps import eval_mode
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalResult:
    """Summed nats over valid targets, and how many there were."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token; NaN when nothing was counted."""
        return self.nats / self.tokens if self.tokens else math.nan


@dataclass(frozen=True)
class BitsPerByte:
    """Summed nats over text tokens and the UTF-8 bytes they stand for."""

    nats: float
    text_bytes: int

    @property
    def value(self) -> float:
        return self.nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


def evaluate(model: GPT, batches: Iterable[Batch], *, device: str, precision: Precision | None = None) -> EvalResult:
    """Loss over batches; rows without a valid target simply do not count."""
    nats, tokens = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            batch = batch.to(device)
            valid = int((batch.y != IGNORED).sum())
            if not valid:
                continue
            with (precision or _full(device)).autocast():
                nats += float(model(batch.x, batch.y, segment=batch.segment))
            tokens += valid
    return EvalResult(nats, tokens)


def _full(device: str) -> Precision:
    return Precision(device, None, False, "evaluation without autocast")


def eval_loss_on_stream(
    model: GPT, *, stream: TokenStream | bytes, B: int, T: int, device: str, eval_steps: int, seed: int
) -> float:
    """Nats per token over `eval_steps` batches of B windows drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    sources = {"stream": as_stream(stream, "stream")}
    batches = (Batch(*get_batch(sources, {"stream": 1.0}, B, T, "cpu", generator)) for _ in range(eval_steps))
    return evaluate(model, batches, device=device).loss


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) UTF-8 bytes each id stands for; 0 for sentinels and other control ids."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], dtype=np.int64)


def bits_per_byte(
    model: GPT,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    B: int,
    device: str,
    precision: Precision | None = None,
    max_windows: int | None = None,
) -> BitsPerByte:
    """Bits per byte over the whole stream in windows of T tokens that do not overlap (stride = context = T).

    max_windows: stop after that many, evenly spread over the stream.
    """
    T = model.cfg.T
    lengths = token_byte_lengths(tokenizer)
    starts = [(a, i) for a, array in enumerate(stream.arrays) for i in range(0, len(array) - T, T)]
    if max_windows is not None and len(starts) > max_windows:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, max_windows)]
    nats, text_bytes = 0.0, 0
    for first in range(0, len(starts), B):
        rows = np.stack([stream.window(i, T, array=a) for a, i in starts[first : first + B]])
        target_bytes = lengths[rows[:, 1:]]
        x, y = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        y[torch.from_numpy(target_bytes == 0)] = IGNORED
        nats += evaluate(model, [Batch(x, y)], device=device, precision=precision).nats
        text_bytes += int(target_bytes.sum())
    return BitsPerByte(nats, text_bytes)


def byte_unigram_bits(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Bits per byte of a byte-frequency table with add-one smoothing: the baseline that knows only letters."""
    counts = np.ones(256, dtype=np.float64)
    for text in train:
        counts += np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    log2p = np.log2(counts / counts.sum())
    seen = np.zeros(256, dtype=np.float64)
    for text in held_out:
        seen += np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    return float(-(seen * log2p).sum() / seen.sum())
