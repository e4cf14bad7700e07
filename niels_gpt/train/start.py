"""What both phases do before the loop: settings, device, threads, tokenizer, and where to go on from."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
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
    run_id, flags = world.from_main(lambda: _run_id_and_flags(phase, resume, limit))
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


def _run_id_and_flags(phase: str, resume: Path | None, limit: TimeLimit) -> tuple[str, dict[str, Any]]:
    """What a checkpoint to go on from decides: the run it belongs to, and how much of the time limit is used."""
    record = record_of(phase, resume)
    return record.get("run_id") or new_run_id(), limit.flags(phase, float(record.get("elapsed_s", 0.0)))


def record_of(phase: str, checkpoint: Path | None) -> dict[str, Any]:
    """The `resume` record of a checkpoint; {} without one, and for what another phase has saved."""
    found = (ckpt.load_checkpoint(checkpoint, device="cpu")["resume"] if checkpoint is not None else None) or {}
    return found if is_of_phase(found, phase) else {}


def is_of_phase(record: Mapping[str, Any], phase: str) -> bool:
    """Whether a checkpoint's `resume` record was saved by this phase; one that does not say counts as such."""
    return bool(record.get("phase", phase) == phase)


def find_resume(phase: str, resume_path: str | Path | None, no_auto_resume: bool) -> Path | None:
    """`--resume PATH` first, then `--no-resume`, else the newest sound checkpoint of this phase (never the root's)."""
    if resume_path is not None:
        path = Path(resume_path)
        if not path.is_file():
            raise FileNotFoundError(f"cannot resume: there is no checkpoint at {path}")
        return path
    return None if no_auto_resume else ckpt.newest_good(phase)


def spent_seconds(phase: str, resume_path: str | Path | None, no_auto_resume: bool) -> float:
    """Seconds that earlier sessions have used of the run that a phase would go on with; 0 for a fresh one."""
    return float(record_of(phase, find_resume(phase, resume_path, no_auto_resume)).get("elapsed_s", 0.0))


def pretrained_model() -> Path:
    """The checkpoint fine-tuning starts from: pretraining's best, or its newest where the best is of an older run.

    RuntimeError if there is none.
    """
    found, newest = ckpt.phase_paths("pretrain"), ckpt.newest_good("pretrain")
    if found.best.is_file() and (newest is None or run_of(found.best) == run_of(newest)):
        return found.best
    if newest is None:
        raise RuntimeError(f"pretraining left no checkpoint in {found.step_dir}; run --phase pretrain first")
    return newest


def run_of(path: Path) -> str | None:
    """The id of the run that a checkpoint was saved by, if it says so."""
    run_id: str | None = (ckpt.load_checkpoint(path, device="cpu")["resume"] or {}).get("run_id")
    return run_id


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
