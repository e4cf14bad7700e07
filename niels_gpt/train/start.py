"""What both phases do before the loop: settings, device, threads, tokenizer, time limit."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.device import keep_freed_memory, resolve_device, use_deterministic_kernels
from niels_gpt.eval import EvalResult
from niels_gpt.files import sha256_file
from niels_gpt.model.native import ops as native
from niels_gpt.paths import ensure_dirs
from niels_gpt.settings import PhaseSettings, ResolvedSettings, Settings, new_run_id, resolve_settings
from niels_gpt.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.lineage import find_resume, is_of_phase, said_by

SHORTEST_BUDGET = 1.0  # seconds: a deadline that is over still leaves time for the last evaluation and save
Overrides = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True)
class Start:
    """A phase about to run."""

    resolved: ResolvedSettings
    device: str
    tokenizer: Tokenizer
    resume: Path | None
    began: float | None = None  # `time.perf_counter()`
    deadline: float | None = None  # `time.time()`
    world: World = ALONE

    @property
    def settings(self) -> Settings:
        return self.resolved.settings

    @property
    def options(self) -> PhaseSettings:
        return self.resolved.training

    @property
    def tokenizer_model(self) -> bytes | None:
        """The tokenizer's file, to travel inside every checkpoint; None for bytes."""
        return self.tokenizer.model_bytes if isinstance(self.tokenizer, SentencePieceTokenizer) else None


@dataclass(frozen=True)
class TimeLimit:
    """How long a phase may take, asked for on the command line: minutes of work, or a moment on the wall clock."""

    minutes: float | None = None
    deadline: float | None = None  # `time.time()`

    def total_minutes(self, spent_seconds: float) -> float | None:
        """The time budget of a run that has used `spent_seconds` in earlier sessions; None without a limit."""
        if self.deadline is None:
            return self.minutes
        return max(spent_seconds + self.deadline - time.time(), SHORTEST_BUDGET) / 60

    def flags(self, phase: str, spent_seconds: float = 0.0) -> dict[str, Any]:
        """As settings."""
        minutes = self.total_minutes(spent_seconds)
        return {} if minutes is None else {"training": {phase: {"minutes": minutes}}}


def start_phase(
    phase: str,
    config: Overrides,
    *,
    device: str | None,
    resume_path: str | Path | None,
    no_auto_resume: bool,
    limit: TimeLimit | None = None,
    world: World = ALONE,
) -> Start:
    """Resolve everything a phase needs; a resumed run keeps its run id. ValueError/FileNotFoundError for people."""
    began, limit = time.perf_counter(), limit or TimeLimit()
    ensure_dirs()
    chosen = resolve_device(device)
    resume = world.from_main(lambda: find_resume(phase, resume_path, no_auto_resume))
    otherwise = "start afresh with --no-resume" if resume_path is None else "leave --resume out"
    run_id, flags = world.from_main(lambda: _run_id_and_flags(phase, config, resume, limit, otherwise))
    resolved = resolve_settings(phase, config, flags=flags, run_id=run_id, write_resolved=world.is_main)
    prepare_process(resolved.settings)
    if chosen == "cpu" and resolved.settings.training.native_kernels and (reason := native.missing()) and world.is_main:
        print(f"note: training with PyTorch only, which is slower: {reason}", file=sys.stderr)
    return Start(resolved, chosen, open_tokenizer(resolved.settings), resume, began, limit.deadline, world)


def prepare_process(settings: Settings) -> None:
    """What settings ask of the whole process: threads, precision of products, kernels."""
    keep_freed_memory()
    reproducibility = settings.reproducibility
    if reproducibility.torch_num_threads is not None:
        torch.set_num_threads(reproducibility.torch_num_threads)
    if reproducibility.torch_matmul_precision is not None:
        torch.set_float32_matmul_precision(reproducibility.torch_matmul_precision)
    if reproducibility.deterministic:
        use_deterministic_kernels()
    native.switch(settings.training.native_kernels)


def _run_id_and_flags(
    phase: str, config: Overrides, resume: Path | None, limit: TimeLimit, otherwise: str
) -> tuple[str, dict[str, Any]]:
    """What a checkpoint to go on from decides: the run it belongs to, and how much of the time limit is used.

    ValueError if its model is another one than that of the settings, before these are put on record as the run's;
    `otherwise` is what to do if the settings are meant.
    """
    if resume is None:
        return new_run_id(), limit.flags(phase)
    loaded = ckpt.load_checkpoint(resume, device="cpu")
    with redirect_stderr(io.StringIO()):  # what it warns of is said when the run's settings are resolved
        wanted = resolve_settings(phase, config)
    try:
        ckpt.check_same_model(loaded, wanted.model_cfg, wanted.arch)
    except ValueError as error:
        raise ValueError(f"cannot go on from {resume}: {error}; use its settings, or {otherwise}") from None
    found = said_by(loaded)
    if not is_of_phase(found.resume, phase):
        return new_run_id(), limit.flags(phase)
    return found.run_id or new_run_id(), limit.flags(phase, found.seconds)


def fingerprint(root: str | Path, sources: Iterable[str]) -> dict[str, str]:
    """sha256 of each source's meta.json, which itself holds the sha256 of every shard."""
    metas = {name: Path(root) / name / "meta.json" for name in sorted(sources)}
    return {name: sha256_file(path) for name, path in metas.items() if path.is_file()}


def eval_shape(options: PhaseSettings) -> tuple[int, int]:
    """(number of batches, rows) of one evaluation."""
    return options.eval_batches or options.eval_steps, options.micro_B_eval or options.micro_B


def metric_weights(options: PhaseSettings) -> dict[str, float]:
    """What best.pt goes by: the weight of each loss, by its settings name."""
    chosen = {str(name): weight for name, weight in (options.best_metric_weights or {}).items()}
    return chosen or {str(options.best_metric): 1.0}


def weighted_metric(options: PhaseSettings, losses: Mapping[str, EvalResult | None]) -> float:
    """What best.pt minimises: one loss by its settings name, or the weighted mean of several; NaN if one is missing."""
    weights = metric_weights(options)
    total = 0.0
    for name, weight in weights.items():
        result = losses.get(name)
        total += weight * (result.loss if result is not None else float("nan"))
    return total / sum(weights.values())
