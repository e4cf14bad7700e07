"""What of a run goes into a checkpoint, and back: weights, optimizer, counters, and what the last bits depend on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt import checkpoint as ckpt
from niels_gpt.checkpoint.loaded import recorded_settings
from niels_gpt.checkpoint.sources import Mixes, learned_from
from niels_gpt.files import explained
from niels_gpt.train import lineage
from niels_gpt.train.budget import Budget
from niels_gpt.train.job import Job
from niels_gpt.train.lineage import is_of_phase
from niels_gpt.train.parallel import as_sharded, whole_state
from niels_gpt.train.report import Reporter
from niels_gpt.train.state import RunState
from niels_gpt.train.step import Stepper

FROM_SETTINGS = ("weight_decay", "betas", "eps", "momentum")  # of an optimizer's groups; learning rates come each step


@dataclass(frozen=True)
class Origin:
    """The checkpoint whose weights a run began with."""

    path: str
    run_id: str | None
    step: int
    learned_from: Mixes | None = field(default=None, compare=False)  # {}: it does not say; None: nobody asked

    @classmethod
    def of(cls, path: Path, loaded: ckpt.Checkpoint) -> Origin:
        mixes = learned_from(loaded, recorded_settings(loaded, path))
        return cls(str(path), (loaded["resume"] or {}).get("run_id"), loaded["step"], mixes)

    def is_still_there(self) -> bool:
        path = Path(self.path)
        return ckpt.is_good(path) and self == Origin.of(path, ckpt.load_checkpoint(path, device="cpu"))


class Saver:
    """Saves and restores one phase of one run."""

    def __init__(self, job: Job, stepper: Stepper, reporter: Reporter, resumed_from: Path | None) -> None:
        self.job, self.stepper, self.reporter, self.resumed_from = job, stepper, reporter, resumed_from
        self.options = job.options
        self.saved_step = -1
        self.origin: Origin | None = None
        self.is_finished = False  # what the newest checkpoint says
        self.finished_seconds: float | None = None  # the time budget that it has completed

    def restore(self, loaded: ckpt.Checkpoint, *, quiet: bool = False) -> tuple[RunState, float]:
        """Load optimizer and scaler; returns the counters and the seconds already spent."""
        resume: dict[str, Any] = loaded["resume"] or {}
        if not quiet:
            self._warn_of_changes(resume)
        stepper = self.stepper
        if loaded["optimizer_state"] is not None:
            self._restore_optimizer(loaded["optimizer_state"])
        if stepper.scaler is not None and resume.get("scaler"):
            stepper.scaler.load_state_dict(resume["scaler"])
        if resume.get("batch") == self._batch() and resume["microbatch"] < stepper.microbatches.size:  # memory ran out
            stepper.microbatches = stepper.microbatches.smaller(resume["microbatch"]) or stepper.microbatches
        step = loaded["step"]
        if not is_of_phase(resume, self.job.phase):  # its counters, clock and best loss mean nothing here
            self.origin = None if self.resumed_from is None else Origin.of(self.resumed_from, loaded)
            return RunState(step=step, good_step=step, evaluated_step=step), 0.0
        self.saved_step = step
        self.origin = Origin(**resume["origin"]) if resume.get("origin") else None
        known = {f.name: resume[f.name] for f in fields(RunState) if f.name in resume}
        best = loaded["best_val_loss"]
        state = RunState(**{"good_step": step, "evaluated_step": step, **known, "step": step, "best_val_loss": best})
        # A kill between the first two files of a save can leave a best loss without its file, or with that of an older
        # run: the next one is the best.
        path = ckpt.phase_paths(self.job.phase).best
        has_best = self.job.world.from_main(lambda: _is_of_run(path, resume.get("run_id")))
        if self.options.save_best and not has_best:
            state.best_val_loss = state.best_step = None
        self.is_finished, self.finished_seconds = resume.get("is_finished", False), resume.get("finished_s")
        return state, float(resume.get("elapsed_s", 0.0))

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Load moments. What the settings say stays: PyTorch would put the checkpoint's values in its place."""
        optimizer, wanted = self.stepper.optimizer, self.options.optimizer
        held = "muon" if "muon" in state else "adamw"
        if held != wanted:
            raise ValueError(
                f"the checkpoint's optimizer state is of {held}, this run uses {wanted}; set"
                f' training.{self.job.phase}.optimizer to "{held}" to go on from it'
            )
        settings = [{name: group[name] for name in FROM_SETTINGS if name in group} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(as_sharded(optimizer, state))
        except ValueError as error:  # the parameters are in other groups
            raise ValueError(
                f"the checkpoint's optimizer state does not fit ({error}); give decay_norm_and_bias and"
                f" decay_embeddings of training.{self.job.phase} the values that it was made with"
            ) from None
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)

    def rollback_point(self, state: RunState) -> tuple[Path | None, bool]:
        """The last good checkpoint and True; else what the run began with (None: random weights) and False."""
        if state.good_step is not None:
            path = ckpt.step_path(self.job.phase, state.good_step)
            if _is_of_run(path, self.job.resolved.run_id):
                return path, True
        elif self.origin is None:
            return None, False
        elif self.origin.is_still_there():
            return Path(self.origin.path), False
        if self.resumed_from is not None and ckpt.is_good(self.resumed_from):
            return self.resumed_from, True
        raise ValueError("there is no sound checkpoint left to roll back to, and training cannot go on from here")

    def _warn_of_changes(self, resume: dict[str, Any]) -> None:
        if not is_of_phase(resume, self.job.phase):
            self.reporter.warn(f"this checkpoint was saved by phase {resume['phase']}, this run is {self.job.phase}")
            return
        planned = resume.get("total_steps", self.options.total_steps)
        if planned != self.options.total_steps:
            self.reporter.warn(f"total_steps was {planned}, is now {self.options.total_steps}: the schedule changes")
        for name, now in {"seed": self.options.seed, "batch": self._batch(), **self._identity()}.items():
            if resume.get(name, now) != now:
                what = "[micro_B, accum_steps]" if name == "batch" else name
                self.reporter.warn(f"{what} was {resume[name]}, is now {now}: the resumed run is not exact to the bit")

    def _identity(self) -> dict[str, Any]:
        """What the last bits of a result depend on, beyond settings."""
        return {
            "torch": str(torch.__version__),
            "device": self.stepper.device,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "precision": self.stepper.precision.name,
            "compiled": self.stepper.compiled,
            "data": dict(self.job.data),
        }

    def _batch(self) -> list[int]:
        """The step's batch as the settings cut it: a smaller cut of the same one is kept, of another one it is not."""
        return [self.options.micro_B, self.options.accum_steps]

    def save(self, state: RunState, budget: Budget, *, is_best: bool, on_schedule: bool, finished: bool) -> bool:
        """One durable step file, then its copies; False if the disk was full or failed, which is a warning on the way.

        on_schedule: a run that nothing disturbs saves here, too: a place to roll back to. finished: nothing follows.
        Raises OSError if the last save fails, NotFinite if the weights are no numbers any more.
        """
        world, began = self.job.world, time.perf_counter()
        good_step = state.good_step
        if on_schedule and not state.skipped_in_a_row:
            state.good_step = state.step
        weights = whole_state(self.stepper.model.state_dict(keep_vars=world.size > 1), world)
        optimizer_state = whole_state(self.stepper.optimizer.state_dict(), world)
        record = self._resume_record(state, budget, finished=finished)
        failure = world.from_main(lambda: self._write(state, weights, optimizer_state, record, is_best=is_best))
        if failure is not None:
            state.good_step = good_step
            if isinstance(failure, ckpt.NotFinite) or not on_schedule:
                raise failure
            self.reporter.warn(f"step {state.step}: not saved: {explained(failure)}; trying again at the next save")
            return False
        self.saved_step, self.is_finished = state.step, finished
        budget.note_save(time.perf_counter() - began)
        return True

    def _write(
        self,
        state: RunState,
        weights: dict[str, Tensor],
        optimizer_state: dict[str, Any],
        record: dict[str, Any],
        *,
        is_best: bool,
    ) -> OSError | ckpt.NotFinite | None:
        """What the main process alone does; a failure that all must know of is returned."""
        job = self.job
        spared = [self.resumed_from, None if state.good_step is None else ckpt.step_path(job.phase, state.good_step)]
        try:
            ckpt.save_checkpoint(
                ckpt.step_path(job.phase, state.step),
                model_cfg=job.resolved.model_cfg,
                train_cfg=ckpt.training_record(job.resolved),
                model=weights,
                optimizer=optimizer_state,
                step=state.step,
                best_val_loss=state.best_val_loss,
                resume=record,
                tokenizer_model=job.tokenizer_model,
            )
            ckpt.publish(
                job.phase,
                state.step,
                is_best=is_best,
                keep_last=self.options.keep_last,
                keep_every=self.options.keep_every,
                sidecar=job.resolved.record(),
                spared=[path for path in spared if path is not None],
            )
        except (OSError, ckpt.NotFinite) as error:
            return error
        return None

    def _resume_record(self, state: RunState, budget: Budget, *, finished: bool) -> dict[str, Any]:
        stepper = self.stepper
        return {
            **{name: value for name, value in asdict(state).items() if name not in ("step", "best_val_loss")},
            "phase": self.job.phase,
            "run_id": self.job.resolved.run_id,
            "seed": self.options.seed,
            "total_steps": self.options.total_steps,
            "elapsed_s": budget.elapsed,
            "origin": None if self.origin is None else asdict(self.origin),
            "is_finished": finished,
            "finished_s": budget.seconds if finished else None,
            "batch": self._batch(),
            "microbatch": stepper.microbatches.size,
            "scaler": None if stepper.scaler is None else stepper.scaler.state_dict(),
            "settings": self.job.resolved.settings.model_dump(mode="json"),
            **self._identity(),
        }


def _is_of_run(path: Path, run_id: str | None) -> bool:
    """Whether there is a sound checkpoint that this run has saved."""
    return ckpt.is_good(path) and lineage.read(path).run_id == run_id
