"""Fine-tuning on chats: whole conversations of the caches in `data.mix_sft`, loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt import checkpoint as ckpt
from niels_gpt.batching import Batch, TokenStream
from niels_gpt.cache.chat_rows import ChatRows, as_chat_row
from niels_gpt.cache.format import SftExamples
from niels_gpt.cache.pretrain import open_source
from niels_gpt.cache.sft import open_mix
from niels_gpt.chat_format import sentinel_ids
from niels_gpt.checkpoint.loaded import recorded_tokenizer
from niels_gpt.epochs import TextRows
from niels_gpt.eval import token_byte_lengths
from niels_gpt.mixes import open_mixes
from niels_gpt.settings import Settings
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.job import Job
from niels_gpt.train.lineage import pretrained_model
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.loop import train
from niels_gpt.train.pretrain import stream_eval
from niels_gpt.train.report import Reporter, reporting
from niels_gpt.train.sample import sampler_for
from niels_gpt.train.start import (
    Overrides,
    Start,
    TimeLimit,
    eval_shape,
    fingerprint,
    metric_weights,
    start_phase,
    weighted_metric,
)

PHASE = "sft"
TEXT = "text/"  # before the names of replayed sources
LOSSES = {"pretrain_val_loss": "pretrain", "sft_val_loss": "sft"}  # name in the settings -> of the evaluation


def run_sft(
    config: Overrides,
    *,
    device: str | None = None,
    resume_path: str | Path | None = None,
    no_auto_resume: bool = False,
    init_model_path: str | Path | None = None,
    from_pretrained: bool = False,
    limit: TimeLimit | None = None,
    quiet: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Fine-tune on chats.

    A fresh run has the weights of `init_model_path`; without it but with `from_pretrained`, those that pretraining left
    here, if they fit; else random ones. Returns `TrainResult.record`, last_val_pretrain_loss and last_val_sft_loss.
    """
    with only_training_here(world):
        start = start_phase(
            PHASE,
            config,
            device=device,
            resume_path=resume_path,
            no_auto_resume=no_auto_resume,
            limit=limit,
            world=world,
        )
        job = sft_job(start)
        with reporting(start, quiet=quiet) as reporter:
            init = _first_weights(start, init_model_path, from_pretrained, reporter) if start.resume is None else None
            result = train(job, device=start.device, reporter=reporter, resume=start.resume, init=init)
    losses = {name: evaluated.loss for name, evaluated in result.last_evals.items()}
    last = {f"last_val_{name}_loss": losses.get(name) for name in ("pretrain", "sft")}
    return {**result.record(), **last}


def _first_weights(start: Start, asked: str | Path | None, from_pretrained: bool, reporter: Reporter) -> Path | None:
    """The checkpoint whose weights a fresh run begins with; None for random ones. Says which.

    ValueError if the one that is asked for does not fit.
    """
    init, why = None if asked is None else Path(asked), "no others are given"
    if init is None and from_pretrained:
        init, why = start.world.from_main(lambda: _pretrained(start))
    elif init is not None and (misfit := start.world.from_main(partial(_misfit, start, init))):
        raise ValueError(f"cannot fine-tune from here: {misfit}; use the settings that it was trained with")
    if init is None:
        reporter.warn(f"fine-tuning starts from random weights: {why}")
    else:
        reporter.say(f"sft init from {init}")
    return init


def _pretrained(start: Start) -> tuple[Path | None, str]:
    try:
        path = pretrained_model()
    except RuntimeError as error:
        return None, str(error)
    misfit = _misfit(start, path)
    return (None, misfit) if misfit else (path, "")


def _misfit(start: Start, path: Path) -> str:
    """Why a run cannot begin with the weights of a checkpoint; "" if it can."""
    loaded = ckpt.load_checkpoint(path, device="cpu")
    if recorded_tokenizer(loaded) not in (None, start.tokenizer.sha256):
        return f"{path} was trained with another tokenizer"
    try:
        ckpt.check_same_model(loaded, start.resolved.model_cfg, start.resolved.arch)
    except ValueError as error:
        return f"{path} does not fit: {error}"
    return ""


def sft_job(start: Start) -> Job:
    """Open the caches and tie them to the loop. ValueError for a byte tokenizer, which no chat cache is made with."""
    settings, options = start.settings, start.options
    T = start.resolved.model_cfg.T
    sentinel_ids(start.tokenizer)
    sources, mix = open_mix(settings, start.tokenizer, "train")
    evals: dict[str, Callable[[], Iterable[Batch]]] = {}
    if (stream := _pretrain_val(start, T)) is not None:
        evals["pretrain"] = stream_eval(stream, start, T)
    if settings.data.val_sft_source == "sft":
        evals["sft"] = _chat_eval(_chat_rows(*open_mix(settings, start.tokenizer, "val"), start), start)
    elif "pretrain" in evals:
        evals["sft"] = evals["pretrain"]
    _check_measured(start, evals)
    chats = _chat_rows(sources, mix, start)
    text = _replayed_text(start, T)
    return Job(
        phase=PHASE,
        resolved=start.resolved,
        batch=chats.batch if text is None else Replay(chats, text, settings.data.replay_pretrain).batch,
        evals=evals,
        metric=lambda found: weighted_metric(options, {name: found.get(of) for name, of in LOSSES.items()}),
        tokenizer_model=start.tokenizer_model,
        world=start.world,
        byte_lengths=token_byte_lengths(start.tokenizer),
        sample=sampler_for(PHASE, settings, start.tokenizer),
        data=sft_fingerprint(settings, sources),
        began=start.began,
        deadline=start.deadline,
    )


def _check_measured(start: Start, evals: Iterable[str]) -> None:
    """ValueError if best.pt is wanted and goes by a loss that nothing here can be measured on."""
    lost = [name for name in metric_weights(start.options) if LOSSES[name] not in evals]
    if not lost or not start.options.save_best:
        return
    data = start.settings.data
    own = 'data.val_sft_source to "sft", ' if "sft_val_loss" in lost else ""
    raise ValueError(
        f"training.{PHASE}.best_metric needs {' and '.join(lost)}, but there is no validation text of"
        f" {data.val_pretrain_source} in {data.caches.pretrain_token_cache}; build it with niels-gpt cache build"
        f" {data.val_pretrain_source} --phase pretrain, or set {own}data.val_pretrain_source to a source that is there"
        f" or training.{PHASE}.save_best to false"
    )


def sft_fingerprint(settings: Settings, sources: Iterable[str]) -> dict[str, str]:
    """What fine-tuning learns from: its chats, and the text it replays (as text/SOURCE)."""
    found = fingerprint(settings.data.caches.sft_token_cache, sources)
    if settings.data.replay_pretrain:
        text = fingerprint(settings.data.caches.pretrain_token_cache, settings.data.mix_pretrain)
        found |= {f"{TEXT}{name}": sha for name, sha in text.items()}
    return found


def _chat_rows(sources: Mapping[str, SftExamples], mix: Mapping[str, float], start: Start) -> ChatRows:
    """The conversations as the settings want them: packed or padded, and which of their tokens are learnt."""
    chat, ids = start.settings.sft_format, start.resolved.special_token_ids
    return ChatRows(
        sources,
        mix,
        start.resolved.model_cfg.T,
        start.options.seed,
        eot_id=ids["eot"] if ids else 0,
        packed=chat.pack_sequences,
        include_eot=chat.include_eot_in_loss,
    )


def _replayed_text(start: Start, T: int) -> TextRows | None:
    """The text of pretraining, which keeps a model from forgetting what it read; None if no row of it is asked for.

    It is read from the end of each epoch: what pretraining with the same seed has not reached comes first.
    """
    if not start.settings.data.replay_pretrain:
        return None
    streams, mix = open_mixes(start.settings, start.tokenizer, T)["train"]
    return TextRows(streams, mix, T, start.options.seed, backwards=True)


class Replay:
    """Rows of chats and, evenly among them, a share of rows of text."""

    def __init__(self, chats: ChatRows, text: TextRows, share: float) -> None:
        self.chats, self.text, self.share = chats, text, Fraction(share).limit_denominator(1000)

    def batch(self, first: int, rows: int) -> Batch:
        """Rows first .. first + rows - 1 of the run."""
        return self.chats.collate([self.row(n) for n in range(first, first + rows)])

    def row(self, n: int) -> np.ndarray:
        """(3, T+1) int64: row n of the run."""
        before, after = int(n * self.share), int((n + 1) * self.share)  # rows of text so far
        return as_chat_row(self.text.row(before)) if after > before else self.chats.row(n - before)


def _chat_eval(chats: ChatRows, start: Start) -> Callable[[], Iterable[Batch]]:
    n_batches, rows = eval_shape(start.options)
    total = min(n_batches * rows, chats.rows_of_epoch)

    def batches() -> Iterator[Batch]:
        for first in range(0, total, rows):
            yield chats.batch(first, min(rows, total - first))

    return batches


def _pretrain_val(start: Start, T: int) -> TokenStream | None:
    """The validation stream of pretraining, if its cache is here: it shows what fine-tuning forgets."""
    try:
        stream = open_source(start.settings, start.tokenizer, start.settings.data.val_pretrain_source, "val")
        stream.windows(T)
    except FileNotFoundError:
        return None
    return stream
