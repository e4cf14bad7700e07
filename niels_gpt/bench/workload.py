"""What a trial measures: the step that `train` takes, on random tokens, so that only model and optimizer count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from niels_gpt.batching import Batch
from niels_gpt.bench.trial import Result, Trial
from niels_gpt.device import choose_precision, memory_in_use, peak_memory, resolve_device, synchronize
from niels_gpt.model.blocks import Block
from niels_gpt.model.gpt import GPT
from niels_gpt.rng import generator_for, seed_for
from niels_gpt.settings import resolve_settings
from niels_gpt.train.job import Job
from niels_gpt.train.memory import DoesNotFit, is_out_of_memory
from niels_gpt.train.start import prepare_process
from niels_gpt.train.state import StepResult
from niels_gpt.train.step import Stepper

MOST_WARMUP = 40  # further steps that fp16 may need until its scale lets an update through
GLANCE = 8  # positions of the forward whose types are looked at
MB = 1e6


class TooLarge(Exception):
    """The step would have gone on with smaller microbatches."""


def measure(trial: Trial) -> Result:
    """Time the steps of a trial in this process. Out of memory is a result; ValueError for what cannot be built."""
    try:
        return _measure(trial)
    except (TooLarge, DoesNotFit) as error:
        return Result(trial, "oom", message=str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Result(trial, "oom", message=(str(error).strip().splitlines() or [type(error).__name__])[0][:300])


def _measure(trial: Trial) -> Result:
    resolve_device(trial.device)
    resolved = resolve_settings("pretrain", overrides_of(trial))
    prepare_process(resolved.settings)
    batch = random_rows(trial)
    job = Job("pretrain", resolved, lambda first, rows: batch, {}, lambda _: float("nan"))
    torch.manual_seed(seed_for(trial.seed, "init"))
    model = GPT(resolved.model_cfg, resolved.arch).to(trial.device).train()
    model.activation_checkpointing = job.options.activation_checkpointing
    precision = choose_precision(trial.device, job.options.amp, job.options.amp_dtype)
    with precision.autocast():
        types = types_seen(model, batch.x[:1, :GLANCE].to(trial.device), trial.device)
    said: list[str] = []

    def warn(line: str) -> None:
        if stepper.microbatches != whole:
            raise TooLarge(f"out of memory with microbatches of {whole.size} rows")
        said.append(line)

    stepper = Stepper(job, model, device=trial.device, precision=precision, warn=warn)
    whole = stepper.microbatches
    seconds = _timed(trial, stepper.step)
    middle = statistics.median(seconds)
    tokens = whole.rows * trial.model.T
    return Result(
        trial,
        "ok",
        ms_per_step=round(1000 * middle, 2),
        tokens_per_sec=round(tokens / middle, 2),
        peak_bytes=peak_memory(trial.device),
        params=model.num_parameters,
        step_seconds=tuple(round(s, 6) for s in seconds),
        dtype_summary=types,
        memory=memory_summary(trial.device),
        compiled=stepper.compiled,
        message="; ".join(said),
    )


def overrides_of(trial: Trial) -> dict[str, Any]:
    """The settings of a trial."""
    given = trial.settings
    training = dict(given.get("training", {}))
    phase = {
        **training.get("pretrain", {}),
        "amp": trial.amp,
        "amp_dtype": trial.amp_dtype,
        "activation_checkpointing": trial.activation_checkpointing,
        "micro_B": trial.micro_B,
        "seed": trial.seed,
    }
    model = {**given.get("model", {}), **trial.as_dict()["model"]}
    return {**given, "model": model, "training": {**training, "pretrain": phase}}


def random_rows(trial: Trial) -> Batch:
    """A microbatch of random tokens, on the CPU as batches of a run are."""
    generator = generator_for(trial.seed, "bench")
    tokens = torch.randint(trial.model.V, (trial.micro_B, trial.model.T + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _timed(trial: Trial, step: Callable[[int], StepResult]) -> list[float]:
    """Seconds of each measured step, with the device's work done; at least one update has been made before."""
    number, applied = 0, False
    while number < trial.steps_warmup or (not applied and number < trial.steps_warmup + MOST_WARMUP):
        applied = step(number).applied or applied
        number += 1
    seconds = []
    for _ in range(trial.steps_measure):
        synchronize(trial.device)
        began = time.perf_counter()
        step(number)
        synchronize(trial.device)
        seconds.append(time.perf_counter() - began)
        number += 1
    return seconds


def types_seen(model: GPT, x: Tensor, device: str) -> dict[str, str]:
    """What autocast makes of a forward: the types that come out of its matrix products."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    inner = next(module for module in block.mlp.modules() if isinstance(module, nn.Linear))
    watched: dict[str, nn.Module] = {"logits": model.lm_head, "attn_qkv": block.attn.qkv, "mlp_intermediate": inner}
    found = {"autocast_enabled": str(torch.is_autocast_enabled(device))}
    hooks = []
    for name, module in watched.items():

        def note(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
            found[name] = str(output.dtype)

        hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {**found, "embed_param": str(model.tok_emb.weight.dtype)}


def memory_summary(device: str) -> dict[str, float]:
    """MB at the highest on CUDA and CPUs, of the driver on MPS."""
    if device == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        return {"allocated_mb": round(memory_in_use(device) / MB, 2), "reserved_mb": round(reserved / MB, 2)}
    name = "driver_allocated_mb" if device == "mps" else "rss_mb"
    return {name: round(peak_memory(device) / MB, 2)}
