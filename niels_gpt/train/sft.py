"""Fine-tuning on chats: whole conversations of the caches in `data.mix_sft`, loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from niels_gpt.batching import Batch, TokenStream
from niels_gpt.cache.format import SftExamples, open_pretrain
from niels_gpt.cache.sft import open_mix, pack_batch, padded_batch
from niels_gpt.epochs import MixedRows
from niels_gpt.mixes import open_mixes
from niels_gpt.model.loss import IGNORED
from niels_gpt.rng import generator_for
from niels_gpt.settings import Settings
from niels_gpt.train.job import Job
from niels_gpt.train.loop import train
from niels_gpt.train.pretrain import stream_eval
from niels_gpt.train.report import Reporter
from niels_gpt.train.start import Overrides, Start, eval_shape, fingerprint, start_phase, weighted_metric

PHASE = "sft"
TEXT = "text/"  # before the names of replayed sources


def run_sft(
    config: Overrides,
    *,
    device: str | None = None,
    resume_path: str | Path | None = None,
    no_auto_resume: bool = False,
    init_model_path: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune on chats; `init_model_path` gives the weights of a fresh run (optimizer, step and best start anew).

    Returns final_step, best_val_loss, last_val_pretrain_loss, last_val_sft_loss, latest_path, best_path.
    """
    start = start_phase(PHASE, config, device=device, resume_path=resume_path, no_auto_resume=no_auto_resume)
    job = sft_job(start)
    init = Path(init_model_path) if init_model_path is not None and start.resume is None else None
    reporter = Reporter(PHASE, start.resolved.run_id, quiet=quiet)
    if start.resume is not None:
        reporter.say(f"resumed from {start.resume}")
    elif init is not None:
        reporter.say(f"sft init from {init}")
    else:
        reporter.warn("fine-tuning starts from random weights; run the pretrain phase or the pipeline first")
    try:
        result = train(job, device=start.device, reporter=reporter, resume=start.resume, init=init)
    finally:
        reporter.close()
    losses = {name: evaluated.loss for name, evaluated in result.last_evals.items()}
    return {
        "final_step": result.state.step,
        "best_val_loss": result.state.best_val_loss,
        "last_val_pretrain_loss": losses.get("pretrain"),
        "last_val_sft_loss": losses.get("sft"),
        "latest_path": result.latest_path,
        "best_path": result.best_path,
        "tokens_seen": result.state.tokens_seen,
        "seconds": result.elapsed,
    }


def sft_job(start: Start) -> Job:
    """Open the caches and tie them to the loop."""
    settings, options = start.settings, start.options
    T = start.resolved.model_cfg.T
    sources, mix = open_mix(settings, start.tokenizer, "train")
    evals: dict[str, Callable[[], Iterable[Batch]]] = {}
    if (stream := _pretrain_val(start, T)) is not None:
        evals["pretrain"] = stream_eval(stream, start, T)
    if settings.data.val_sft_source == "sft":
        val_sources, val_mix = open_mix(settings, start.tokenizer, "val")
        evals["sft"] = _chat_eval(val_sources, val_mix, start, T)
    elif "pretrain" in evals:
        evals["sft"] = evals["pretrain"]
    draw, replay = _drawer(start, T), _replayer(start, T)

    def next_batch(step: int, microbatch: int) -> Batch:
        generator = generator_for(options.seed, "data", step, microbatch)
        text = replay(step * options.accum_steps + microbatch)
        rows = options.micro_B - (0 if text is None else len(text.x))
        chat = draw(sources, mix, rows, generator)
        return chat if text is None else join_rows(chat, text)

    return Job(
        phase=PHASE,
        resolved=start.resolved,
        next_batch=next_batch,
        evals=evals,
        metric=lambda found: weighted_metric(
            options, {"pretrain_val_loss": found.get("pretrain"), "sft_val_loss": found.get("sft")}
        ),
        tokenizer_model=start.tokenizer_model,
        data=sft_fingerprint(settings, sources),
    )


def sft_fingerprint(settings: Settings, sources: Iterable[str]) -> dict[str, str]:
    """What fine-tuning learns from: its chats, and the text it replays (as text/SOURCE)."""
    found = fingerprint(settings.data.caches.sft_token_cache, sources)
    if settings.data.replay_pretrain:
        text = fingerprint(settings.data.caches.pretrain_token_cache, settings.data.mix_pretrain)
        found |= {f"{TEXT}{name}": sha for name, sha in text.items()}
    return found


Sources = dict[str, SftExamples]
Draw = Callable[[Sources, dict[str, float], int, torch.Generator], Batch]


def _drawer(start: Start, T: int) -> Draw:
    """How conversations become rows: packed or padded, and which of their tokens are learnt."""
    chat = start.settings.sft_format
    build = pack_batch if chat.pack_sequences else padded_batch
    eot = start.resolved.special_token_ids["eot"] if start.resolved.special_token_ids else 0

    def draw(sources: Sources, mix: dict[str, float], rows: int, generator: torch.Generator) -> Batch:
        batch = build(sources, mix, B=rows, T=T, generator=generator, eot_id=eot)
        if not chat.include_eot_in_loss:
            batch = replace(batch, y=batch.y.masked_fill(batch.y == eot, IGNORED))
        return batch

    return draw


def _replayer(start: Start, T: int) -> Callable[[int], Batch | None]:
    """The rows of plain text in the n-th microbatch, which keep a model from forgetting what it read; or None.

    They are read from the end of each epoch: what pretraining with the same seed has not reached comes first.
    """
    settings = start.settings
    rows = min(round(start.options.micro_B * settings.data.replay_pretrain), start.options.micro_B - 1)
    if not rows:
        return lambda n: None
    streams, mix = open_mixes(settings, start.tokenizer, T)["train"]
    mixed = MixedRows(streams, mix, T, start.options.seed, backwards=True)
    return lambda n: mixed.batch(n * rows, rows)


def join_rows(chat: Batch, text: Batch) -> Batch:
    """Rows of chats and of text in one batch; a row of text is one segment."""
    segment = None if chat.segment is None else torch.cat([chat.segment, torch.zeros_like(text.x)])
    return Batch(torch.cat([chat.x, text.x]), torch.cat([chat.y, text.y]), segment)


def _chat_eval(sources: Sources, mix: dict[str, float], start: Start, T: int) -> Callable[[], Iterable[Batch]]:
    draw = _drawer(start, T)
    n_batches, rows = eval_shape(start.options)

    def batches() -> Iterator[Batch]:
        generator = generator_for(start.options.seed, "eval/sft")
        for _ in range(n_batches):
            yield draw(sources, mix, rows, generator)

    return batches


def _pretrain_val(start: Start, T: int) -> TokenStream | None:
    """The validation stream of pretraining, if its cache is here: it shows what fine-tuning forgets."""
    data, tokenizer = start.settings.data, start.tokenizer
    try:
        stream = open_pretrain(
            data.caches.pretrain_token_cache,
            data.val_pretrain_source,
            "val",
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=start.settings.model.V,
            special_token_ids=tokenizer.special_token_ids(),
        )
        stream.windows(T)
    except FileNotFoundError:
        return None
    return stream
