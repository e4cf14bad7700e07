"""The text of the quality benchmark: what both systems and the n-gram learn from, and what all are judged on"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from niels_gpt.batching import TokenStream
from niels_gpt.cache.pretrain import build_pretrain, open_mix
from niels_gpt.device import Precision
from niels_gpt.eval import bits_per_byte, token_byte_lengths, window_starts
from niels_gpt.settings import Settings, load_overrides, validate_overrides
from niels_gpt.tokenizer import Tokenizer, load_tokenizer
from niels_gpt.train.prepare import make_tokenizer
from tools.quality_ngram import KneserNey

EVAL_ROWS = 32


def make_overrides(config: Path, folder: Path, *, seed: int) -> dict[str, Any]:
    """A config's settings for runs of pretraining alone; files go to `folder`.

    The learning rate falls to where the config's last phase ends, as nothing follows that would end the schedule.
    """
    overrides = load_overrides(config)
    settings = validate_overrides(overrides)
    folder = folder.resolve()
    pretrain = {"seed": seed, "min_lr": settings.training.sft.min_lr}
    overrides.setdefault("training", {}).setdefault("pretrain", {}).update(pretrain)
    overrides.setdefault("tokenizer", {})["model_path"] = str(folder / "tokenizer" / "spm.model")
    overrides.setdefault("data", {}).setdefault("caches", {})["pretrain_token_cache"] = str(folder / "cache")
    return overrides


def build_text(overrides: dict[str, Any]) -> None:
    """The tokenizer and token caches that the overrides name; those of an earlier run are used again.

    The seed of a run does not reach them, so that runs with different seeds have the same text.
    """
    settings = validate_overrides(overrides)
    caches = settings.data.caches
    tokenizer = make_tokenizer(settings, caches.seed, lambda said: None)
    for name in sorted(settings.data.mix_pretrain):
        build_pretrain(settings, tokenizer, name, root=caches.pretrain_token_cache)


@dataclass(frozen=True)
class Text:
    """Token streams of the training text, and the held-out one: all of it, and the windows of the curves."""

    settings: Settings
    tokenizer: Tokenizer
    train: dict[str, TokenStream]
    held_out: TokenStream
    starts: list[tuple[int, int]]  # (array, first token) of each window of the curves

    @property
    def windows(self) -> TokenStream:
        """The windows of the curves, each an array of its own."""
        T = self.settings.model.T
        return TokenStream([self.held_out.arrays[a][i : i + T + 1] for a, i in self.starts], self.held_out.name)

    def bits(self, model: nn.Module, *, device: str, precision: Precision, everything: bool = False) -> float:
        """Bits per byte of a model with `cfg.T` and summed nats as output: of the windows, or of all held-out text."""
        stream = self.held_out if everything else self.windows
        found = bits_per_byte(model, stream, self.tokenizer, B=EVAL_ROWS, device=device, precision=precision)
        return found.value

    def blocks(self) -> np.ndarray:
        """(n, T) int64: the training text cut into blocks, each once; what is left at the end of a stream is dropped.

        The field's way of preparing text for transformers' Trainer.
        """
        T = self.settings.model.T
        arrays = [array for _, stream in sorted(self.train.items()) for array in stream.arrays]
        return np.concatenate([a[: len(a) // T * T].reshape(-1, T) for a in arrays]).astype(np.int64)


def open_text(overrides: dict[str, Any], max_windows: int) -> Text:
    """The text that `build_text` made. The curves' windows are spread evenly over the validation source."""
    settings = validate_overrides(overrides)
    tokenizer = load_tokenizer(settings.tokenizer.model_path)
    T = settings.model.T
    train, _ = open_mix(settings, tokenizer, "train", T)
    held_out = open_mix(settings, tokenizer, "val", T)[0][settings.data.val_pretrain_source]
    starts = window_starts(held_out, T)
    if len(starts) > max_windows:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, max_windows)]
    return Text(settings, tokenizer, train, held_out, starts)


def documents(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents of a token stream as bytes, without the sentinels between them."""
    pieces = np.array([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], dtype=object)
    ends = [] if tokenizer.eot_id is None else np.flatnonzero(ids == tokenizer.eot_id) + 1
    for document in np.split(ids, ends):
        if len(document):
            yield b"".join(pieces[document])


@dataclass(frozen=True)
class Floor:
    """Bits per byte of the n-gram, on the windows of the curves and on all held-out text."""

    windows: float
    everything: float
    order: int
    train_bytes: int
    held_out_bytes: int


def measure_floor(text: Text) -> Floor:
    """Train the byte n-gram on the whole training text and score exactly the bytes the models are scored on."""
    tokenizer, T = text.tokenizer, text.settings.model.T
    train = [d for stream in text.train.values() for array in stream.arrays for d in documents(array, tokenizer)]
    model = KneserNey(train)
    lengths = token_byte_lengths(tokenizer)
    ends = [np.concatenate([[0], np.cumsum(lengths[array])]) for array in text.held_out.arrays]
    scores = [model.log2_probabilities(list(documents(array, tokenizer))) for array in text.held_out.arrays]
    summed = [np.concatenate([[0.0], np.cumsum(log2p)]) for log2p in scores]

    def bits(starts: list[tuple[int, int]]) -> tuple[float, int]:
        """Bits per byte of windows, and how many bytes: the first token of a window is context only."""
        spans = [(a, ends[a][i + 1], ends[a][i + T + 1]) for a, i in starts]
        n_bytes = int(sum(last - first for _, first, last in spans))
        return float(sum(summed[a][first] - summed[a][last] for a, first, last in spans) / n_bytes), n_bytes

    everything, held_out_bytes = bits(window_starts(text.held_out, T))
    return Floor(bits(text.starts)[0], everything, model.order, sum(map(len, train)), held_out_bytes)
