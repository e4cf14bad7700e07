"""Pretraining: windows of the text in `data.mix_pretrain`, evaluated on every source's validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from niels_gpt.batching import Batch, TokenStream, get_batch
from niels_gpt.epochs import TextRows
from niels_gpt.eval import token_byte_lengths
from niels_gpt.mixes import open_mixes, text_hashes
from niels_gpt.rng import generator_for
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.job import Job
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.loop import train
from niels_gpt.train.report import reporting
from niels_gpt.train.sample import sampler_for
from niels_gpt.train.start import Overrides, Start, TimeLimit, eval_shape, fingerprint, start_phase, weighted_metric

PHASE = "pretrain"


def run_pretrain(
    config: Overrides,
    *,
    device: str | None = None,
    resume_path: str | Path | None = None,
    no_auto_resume: bool = False,
    limit: TimeLimit | None = None,
    quiet: bool = False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train a model from scratch, or on from its newest checkpoint.

    config: a settings file, a settings-shaped dict, or None. Returns `TrainResult.record` and last_val_loss.
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
        job = pretrain_job(start)
        with reporting(start, quiet=quiet) as reporter:
            result = train(job, device=start.device, reporter=reporter, resume=start.resume)
    last = result.last_evals.get(start.settings.data.val_pretrain_source)
    return {**result.record(), "last_val_loss": last.loss if last is not None else None}


def pretrain_job(start: Start) -> Job:
    """Open the caches and tie them to the loop."""
    settings, options = start.settings, start.options
    T = start.resolved.model_cfg.T
    text = open_mixes(settings, start.tokenizer, T)
    (streams, mix), (val_streams, _) = text["train"], text["val"]
    on_caches = start.tokenizer.kind != "byte"

    return Job(
        phase=PHASE,
        resolved=start.resolved,
        batch=TextRows(streams, mix, T, options.seed).batch,
        evals={name: stream_eval(stream, start, T) for name, stream in val_streams.items()},
        metric=lambda evals: weighted_metric(
            options, {"pretrain_val_loss": evals.get(settings.data.val_pretrain_source)}
        ),
        tokenizer_model=start.tokenizer_model,
        world=start.world,
        byte_lengths=token_byte_lengths(start.tokenizer),
        sample=sampler_for(PHASE, settings, start.tokenizer),
        data=fingerprint(settings.data.caches.pretrain_token_cache, streams)
        if on_caches
        else text_hashes(settings, streams),
        began=start.began,
        deadline=start.deadline,
    )


def stream_eval(stream: TokenStream, start: Start, T: int) -> Callable[[], Iterable[Batch]]:
    """The same windows of a validation stream at every evaluation."""
    n_batches, rows = eval_shape(start.options)

    def batches() -> Iterator[Batch]:
        generator = generator_for(start.options.seed, f"eval/{stream.name}")
        for _ in range(n_batches):
            yield Batch(*get_batch({stream.name: stream}, {stream.name: 1.0}, rows, T, "cpu", generator))

    return batches
