"""THE training loop, for both phases: step, log, evaluate, save, stop.

A step is a function of (weights, optimizer state, step number): batches and dropout are seeded by the step, so a run
that is killed and resumed goes on to the bit. `pretrain` and `sft` differ in the `Job` they hand over.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt import checkpoint as ckpt
from niels_gpt.batching import Batch
from niels_gpt.device import choose_precision, memory_in_use, synchronize
from niels_gpt.eval import EvalResult, evaluate
from niels_gpt.files import is_disk_full
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.optim import build_optimizer, set_learning_rate
from niels_gpt.rng import seed_for
from niels_gpt.train.budget import Budget
from niels_gpt.train.job import Job
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.report import Reporter, StepReport
from niels_gpt.train.signals import StopRequest, catching_signals

LOSS_WINDOW = 50  # steps in the moving average of the logged train_loss
MAX_SKIPPED_IN_A_ROW = 5


class Interrupted(Exception):
    """A signal ended training after its state was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class RunState:
    """What changes while a run goes on, besides weights and optimizer state. Saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0  # supervised targets
    skipped_steps: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per supervised token
    grad_norm: float
    tokens: int
    applied: bool  # False when the loss or a gradient was not finite


@dataclass(frozen=True)
class TrainResult:
    state: RunState
    last_evals: dict[str, EvalResult]
    elapsed: float  # seconds, earlier sessions included
    latest_path: Path
    best_path: Path


class Loop:
    """One phase of one run on one process."""

    def __init__(self, job: Job, *, device: str, reporter: Reporter, resume: Path | None, init: Path | None) -> None:
        """resume: checkpoint to go on from. init: checkpoint whose weights start a fresh run."""
        self.job, self.device, self.reporter = job, device, reporter
        self.options = job.options
        self.resumed_from = resume
        torch.manual_seed(seed_for(self.options.seed, "init"))
        self.model = GPT(job.resolved.model_cfg, job.resolved.arch)
        self.state = RunState()
        loaded = ckpt.load_checkpoint(source, device="cpu") if (source := resume or init) is not None else None
        if loaded is not None:
            ckpt.validate_model_config_match(loaded["model_cfg"], job.resolved.model_cfg)
            self.model.load_state_dict(ckpt.build_model(loaded).state_dict())
        self.model.to(device).train()
        self.model.activation_checkpointing = self.options.activation_checkpointing
        self.precision = choose_precision(device, self.options.amp, self.options.amp_dtype)
        self.scaler = torch.amp.GradScaler(device) if self.precision.needs_scaler else None
        ns_dtype = torch.bfloat16 if self.precision.dtype is torch.bfloat16 else torch.float32
        self.optimizer = build_optimizer(self.model, self.options, ns_dtype=ns_dtype)
        spent = self._restore(loaded) if loaded is not None and resume is not None else 0.0
        self.budget = Budget(self.options, spent_seconds=spent)
        self.forward = torch.compile(self.model) if self.options.compile else self.model
        self.microbatches = Microbatches(self.options.micro_B, self.options.accum_steps)
        self.recent: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.last_evals: dict[str, EvalResult] = {}
        self._saved_step = self.state.step if resume is not None else -1

    def _restore(self, loaded: ckpt.Checkpoint) -> float:
        """Optimizer and counters of a checkpoint; returns the seconds already spent."""
        resume: dict[str, Any] = loaded["resume"] or {}
        if resume.get("phase", self.job.phase) != self.job.phase:
            self.reporter.warn(f"this checkpoint was saved by phase {resume['phase']}, this run is {self.job.phase}")
        planned = resume.get("total_steps", self.options.total_steps)
        if planned != self.options.total_steps:
            self.reporter.warn(f"total_steps was {planned}, is now {self.options.total_steps}: the schedule changes")
        for name, now in self._identity().items():
            if resume.get(name, now) != now:
                self.reporter.warn(f"{name} was {resume[name]}, is now {now}: the resumed run is not exact to the bit")
        if loaded["optimizer_state"] is not None:
            self.optimizer.load_state_dict(loaded["optimizer_state"])
        if self.scaler is not None and resume.get("scaler"):
            self.scaler.load_state_dict(resume["scaler"])
        # A kill between the first two files of a save can leave a best loss without its file: the next one is the best.
        has_best = ckpt.phase_paths(self.job.phase).best.is_file()
        self.state = RunState(
            step=loaded["step"],
            tokens_seen=resume.get("tokens_seen", 0),
            skipped_steps=resume.get("skipped_steps", 0),
            best_val_loss=loaded["best_val_loss"] if has_best else None,
            best_step=resume.get("best_step") if has_best else None,
        )
        return float(resume.get("elapsed_s", 0.0))

    def _identity(self) -> dict[str, Any]:
        """What the last bits of a result depend on, beyond settings."""
        return {
            "torch": str(torch.__version__),
            "device": self.device,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "precision": self.precision.name,
            "data": dict(self.job.data),
        }

    def run(self) -> TrainResult:
        """Train to the end of the budget. Raises Interrupted after a signal, ValueError/OSError if it cannot go on."""
        self.reporter.start(self)
        with catching_signals() as stop:
            while not self.budget.done(self.state.step):
                self._one_step()
                if stop:
                    self._leave(stop)
            self._finish()
        return TrainResult(
            self.state,
            self.last_evals,
            self.budget.elapsed,
            ckpt.phase_paths(self.job.phase).latest,
            ckpt.phase_paths(self.job.phase).best,
        )

    def _one_step(self) -> None:
        state, options = self.state, self.options
        began = time.perf_counter()
        lr = self.budget.learning_rate(state.step)
        set_learning_rate(self.optimizer, lr, options)
        with self.reporter.clock("step"):
            result = self.train_step(state.step)
            synchronize(self.device)
        state.step += 1
        state.tokens_seen += result.tokens
        self._note_skips(result)
        if result.applied:
            self.recent.append(result.loss)
        self.reporter.step(
            StepReport(
                step=state.step,
                total_steps=None if options.minutes else options.total_steps,
                progress=self.budget.progress(state.step),
                lr=lr,
                loss=result.loss,
                mean_loss=sum(self.recent) / len(self.recent) if self.recent else math.nan,
                grad_norm=result.grad_norm,
                tokens=self.microbatches.rows * self.job.resolved.model_cfg.T,
                tokens_seen=state.tokens_seen,
                seconds=time.perf_counter() - began,
                remaining=self.budget.remaining_seconds(state.step, time.perf_counter() - began),
                memory=memory_in_use(self.device) if state.step % options.log_every == 0 else 0,
            )
        )
        with self.reporter.clock("evaluation"):
            is_best = state.step % options.eval_every == 0 and self.evaluate()
        if is_best or state.step % options.ckpt_every == 0:
            self._save(is_best, final=False)

    def _note_skips(self, result: StepResult) -> None:
        self._skipped_in_a_row = 0 if result.applied else getattr(self, "_skipped_in_a_row", 0) + 1
        if result.applied:
            return
        self.state.skipped_steps += 1
        self.reporter.warn(f"step {self.state.step}: loss or gradient is not finite; the step was skipped")
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite; lower training.{self.job.phase}.base_lr"
                " (or switch amp off) and resume from the last checkpoint"
            )

    def train_step(self, step: int) -> StepResult:
        """Forward and backward over the step's microbatches, clip, update. A non-finite step leaves no trace."""
        options = self.options
        cut = self.microbatches
        with self.reporter.clock("data"):
            batches = [(m, self._checked(self.job.batch(first, cut.size))) for m, first in cut.of_step(step)]
        valid = sum(int((batch.y != IGNORED).sum()) for _, batch in batches)
        if not valid:
            raise ValueError(f"step {step}: no batch holds a token to learn from; check the data of this phase")
        nats = 0.0
        for microbatch, batch in batches:
            torch.manual_seed(seed_for(options.seed, "dropout", step, microbatch))
            batch = batch.to(self.device)
            with self.precision.autocast():
                total: Tensor = self.forward(batch.x, batch.y, segment=batch.segment)
            loss = total / valid  # so that the gradient is that of the mean over all of the step's tokens
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
            nats += float(total.detach())
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip))
        finite = math.isfinite(nats) and math.isfinite(norm)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # type: ignore[arg-type]  # skips by itself when not finite
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(nats / valid, norm, valid, finite)

    def _checked(self, batch: Batch) -> Batch:
        V = self.job.resolved.model_cfg.V
        low, high = int(batch.x.min()), max(int(batch.x.max()), int(batch.y.max()))
        if low < 0 or high >= V:
            raise ValueError(
                f"a batch holds token id {high if high >= V else low}, the model knows 0..{V - 1} (model.V={V}); "
                "the caches were built for a larger vocabulary: raise model.V or rebuild them"
            )
        return batch

    def evaluate(self) -> bool:
        """Measure every validation source; True if the metric improved (never on a non-finite one)."""
        began = time.perf_counter()
        self.last_evals = {
            name: evaluate(
                self.model,
                batches(),
                device=self.device,
                precision=self.precision,
                byte_lengths=self.job.byte_lengths,
            )
            for name, batches in self.job.evals.items()
        }
        sample = self.job.sample(self.model) if self.job.sample is not None else None
        metric = self.job.metric(self.last_evals) if self.last_evals else math.nan
        best = self.state.best_val_loss
        improved = math.isfinite(metric) and (best is None or metric < best)
        if improved:
            self.state.best_val_loss, self.state.best_step = metric, self.state.step
        self.reporter.evaluated(self.state.step, self.last_evals, metric, improved, sample)
        self.budget.reserve = max(self.budget.reserve, 1.2 * (time.perf_counter() - began))
        return improved and self.options.save_best

    def _finish(self) -> None:
        """Last evaluation and save, unless the last step just did both."""
        with self.reporter.clock("evaluation"):
            is_best = self.evaluate() if self.state.step % self.options.eval_every else False
        if self._saved_step != self.state.step or is_best:
            self._save(is_best, final=True)
        self.reporter.finish(self.state.step, self.budget.elapsed)

    def _leave(self, stop: StopRequest) -> None:
        if self._saved_step != self.state.step:
            self._save(is_best=False, final=True)
        raise Interrupted(
            f"stopped by signal {stop.signum} after step {self.state.step}; saved to "
            f"{ckpt.phase_paths(self.job.phase).latest}. Run the same command again to go on from there",
            stop.exit_code,
        )

    def _save(self, is_best: bool, *, final: bool) -> None:
        """One durable step file, then its copies. A full disk is an error at the end and a warning on the way."""
        with self.reporter.saving(self.state.step):
            self._write(is_best, final=final)

    def _write(self, is_best: bool, *, final: bool) -> None:
        job, state = self.job, self.state
        try:
            ckpt.save_checkpoint(
                ckpt.step_path(job.phase, state.step),
                model_cfg=job.resolved.model_cfg,
                train_cfg=ckpt.training_record(job.resolved),
                model=self.model,
                optimizer=self.optimizer,
                step=state.step,
                best_val_loss=state.best_val_loss,
                resume=self._resume_record(),
                tokenizer_model=job.tokenizer_model,
            )
            ckpt.publish(
                job.phase,
                state.step,
                is_best=is_best,
                keep_last=self.options.keep_last,
                sidecar=job.resolved.record(),
                resumed_from=self.resumed_from,
            )
        except OSError as error:
            if final or not is_disk_full(error):
                raise
            reason = error.strerror or error
            self.reporter.warn(f"step {state.step}: not saved: {reason}; trying again at the next save")
            return
        self._saved_step = state.step

    def _resume_record(self) -> dict[str, Any]:
        return {
            "phase": self.job.phase,
            "run_id": self.job.resolved.run_id,
            "seed": self.options.seed,
            "total_steps": self.options.total_steps,
            "tokens_seen": self.state.tokens_seen,
            "skipped_steps": self.state.skipped_steps,
            "best_step": self.state.best_step,
            "elapsed_s": self.budget.elapsed,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "settings": self.job.resolved.settings.model_dump(mode="json"),
            **self._identity(),
        }


def train(
    job: Job, *, device: str, reporter: Reporter, resume: Path | None = None, init: Path | None = None
) -> TrainResult:
    """Run one phase: fresh, from another model's weights (`init`), or on from its own checkpoint (`resume`)."""
    ckpt.prepare_phase(job.phase)
    return Loop(job, device=device, reporter=reporter, resume=resume, init=init).run()
