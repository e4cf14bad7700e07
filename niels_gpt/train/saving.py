"""What of a run goes into a checkpoint, and back: weights, optimizer, counters, and what the last bits depend on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt import checkpoint as ckpt
from niels_gpt.files import is_disk_full
from niels_gpt.train.budget import Budget
from niels_gpt.train.job import Job
from niels_gpt.train.parallel import as_sharded, whole_state
from niels_gpt.train.report import Reporter
from niels_gpt.train.state import RunState
from niels_gpt.train.step import Stepper


class Saver:
    """Saves and restores one phase of one run."""

    def __init__(self, job: Job, stepper: Stepper, reporter: Reporter, resumed_from: Path | None) -> None:
        self.job, self.stepper, self.reporter, self.resumed_from = job, stepper, reporter, resumed_from
        self.options = job.options
        self.saved_step = -1

    def restore(self, loaded: ckpt.Checkpoint) -> tuple[RunState, float]:
        """Load optimizer and scaler; returns the counters and the seconds already spent."""
        resume: dict[str, Any] = loaded["resume"] or {}
        self._warn_of_changes(resume)
        if loaded["optimizer_state"] is not None:
            optimizer = self.stepper.optimizer
            optimizer.load_state_dict(as_sharded(optimizer, loaded["optimizer_state"]))
        if self.stepper.scaler is not None and resume.get("scaler"):
            self.stepper.scaler.load_state_dict(resume["scaler"])
        # A kill between the first two files of a save can leave a best loss without its file: the next one is the best.
        has_best = self.job.world.from_main(ckpt.phase_paths(self.job.phase).best.is_file)
        state = RunState(
            step=loaded["step"],
            tokens_seen=resume.get("tokens_seen", 0),
            skipped_steps=resume.get("skipped_steps", 0),
            best_val_loss=loaded["best_val_loss"] if has_best else None,
            best_step=resume.get("best_step") if has_best else None,
        )
        self.saved_step = state.step
        return state, float(resume.get("elapsed_s", 0.0))

    def _warn_of_changes(self, resume: dict[str, Any]) -> None:
        if resume.get("phase", self.job.phase) != self.job.phase:
            self.reporter.warn(f"this checkpoint was saved by phase {resume['phase']}, this run is {self.job.phase}")
        planned = resume.get("total_steps", self.options.total_steps)
        if planned != self.options.total_steps:
            self.reporter.warn(f"total_steps was {planned}, is now {self.options.total_steps}: the schedule changes")
        for name, now in self._identity().items():
            if resume.get(name, now) != now:
                self.reporter.warn(f"{name} was {resume[name]}, is now {now}: the resumed run is not exact to the bit")

    def _identity(self) -> dict[str, Any]:
        """What the last bits of a result depend on, beyond settings."""
        return {
            "torch": str(torch.__version__),
            "device": self.stepper.device,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "precision": self.stepper.precision.name,
            "data": dict(self.job.data),
        }

    def save(self, state: RunState, budget: Budget, *, is_best: bool, final: bool) -> None:
        """One durable step file, then its copies. A full disk is an error at the end and a warning on the way."""
        world = self.job.world
        weights = whole_state(self.stepper.model.state_dict(keep_vars=world.size > 1), world)
        optimizer_state = whole_state(self.stepper.optimizer.state_dict(), world)
        write = partial(self._write, weights, optimizer_state, state, budget, is_best=is_best, final=final)
        if world.from_main(write):
            self.saved_step = state.step

    def _write(
        self,
        weights: dict[str, Tensor],
        optimizer_state: dict[str, Any],
        state: RunState,
        budget: Budget,
        *,
        is_best: bool,
        final: bool,
    ) -> bool:
        """The part of the main process; False if the disk was full."""
        job = self.job
        try:
            ckpt.save_checkpoint(
                ckpt.step_path(job.phase, state.step),
                model_cfg=job.resolved.model_cfg,
                train_cfg=ckpt.training_record(job.resolved),
                model=weights,
                optimizer=optimizer_state,
                step=state.step,
                best_val_loss=state.best_val_loss,
                resume=self._resume_record(state, budget),
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
            return False
        return True

    def _resume_record(self, state: RunState, budget: Budget) -> dict[str, Any]:
        scaler = self.stepper.scaler
        return {
            "phase": self.job.phase,
            "run_id": self.job.resolved.run_id,
            "seed": self.options.seed,
            "total_steps": self.options.total_steps,
            "tokens_seen": state.tokens_seen,
            "skipped_steps": state.skipped_steps,
            "best_step": state.best_step,
            "elapsed_s": budget.elapsed,
            "scaler": None if scaler is None else scaler.state_dict(),
            "settings": self.job.resolved.settings.model_dump(mode="json"),
            **self._identity(),
        }
