"""Measuring a model: loss in nats per token, and bits per byte where tokenizers differ.

Every figure is a sum of nats over a count, never a mean of means. Bits per byte = nats / (ln 2 * UTF-8 bytes of the
text), sentinels left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from niels_gpt import contention
from niels_gpt.batching import Batch, TokenStream, as_stream, get_batch
from niels_gpt.device import Precision, choose_precision
from niels_gpt.infer.steps import eval_mode
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import Tokenizer

EVALUATION_ROWS = 32  # windows of a forward pass that measures held-out text


@dataclass(frozen=True)
class BitsPerByte:
    """Summed nats over text tokens and the UTF-8 bytes they stand for."""

    nats: float
    text_bytes: int

    @property
    def value(self) -> float:
        """nats / (ln 2 * bytes); NaN without text."""
        return self.nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


@dataclass(frozen=True)
class EvalResult:
    """Summed nats over valid targets, and how many there were; `text`: those of them that stand for text."""

    nats: float
    tokens: int
    text: BitsPerByte = BitsPerByte(0.0, 0)  # empty when nobody said how long tokens are

    @property
    def loss(self) -> float:
        """Nats per token; NaN when nothing was counted."""
        return self.nats / self.tokens if self.tokens else math.nan


def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    *,
    device: str,
    precision: Precision | None = None,
    byte_lengths: np.ndarray | None = None,
) -> EvalResult:
    """Loss over batches; rows without a valid target simply do not count.

    byte_lengths: bytes of each id, 0 for sentinels (`token_byte_lengths`); with it the result has bits per byte,
    from the same forward passes: only the head runs again, on the few sentinels, whose nats are not the text's.
    """
    nats, text_nats, tokens, text_bytes = 0.0, 0.0, 0, 0
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            contention.look()
            valid = int((batch.y != IGNORED).sum())
            if not valid:
                continue
            apart = None
            if byte_lengths is not None:
                lengths = torch.from_numpy(byte_lengths)[batch.y.clamp_min(0)].masked_fill(batch.y == IGNORED, 0)
                apart = batch.y.masked_fill(lengths > 0, IGNORED).to(device)
                text_bytes += int(lengths.sum())
            batch = batch.to(device)
            with (precision or _full(device)).autocast():
                found = model(batch.x, batch.y, segment=batch.segment, apart=apart).tolist()
            total, of_sentinels = (found, 0.0) if apart is None else found
            nats, text_nats, tokens = nats + total, text_nats + total - of_sentinels, tokens + valid
    return EvalResult(nats, tokens, BitsPerByte(text_nats if text_bytes else 0.0, text_bytes))


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
    starts = window_starts(stream, T)
    if max_windows is not None and len(starts) > max_windows:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, max_windows)]

    def batches() -> Iterator[Batch]:
        for first in range(0, len(starts), B):
            rows = torch.from_numpy(np.stack([stream.window(i, T, array=a) for a, i in starts[first : first + B]]))
            yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    lengths = token_byte_lengths(tokenizer)
    return evaluate(model, batches(), device=device, precision=precision, byte_lengths=lengths).text


def held_out_bits(
    model: GPT, stream: TokenStream, tokenizer: Tokenizer, settings: Settings, *, max_windows: int | None = None
) -> BitsPerByte:
    """`bits_per_byte` of a trained model where it is, in the precision of the pretraining that `settings` describe."""
    device, options = model.tok_emb.weight.device.type, settings.training.pretrain
    precision = choose_precision(device, options.amp, options.amp_dtype)
    rows = EVALUATION_ROWS
    return bits_per_byte(model, stream, tokenizer, B=rows, device=device, precision=precision, max_windows=max_windows)


def window_starts(stream: TokenStream, T: int) -> list[tuple[int, int]]:
    """(array, first token) of every window of T+1 tokens that `bits_per_byte` scores: context and stride T."""
    return [(a, i) for a, array in enumerate(stream.arrays) for i in range(0, len(array) - T, T)]


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
