"""THE training loop, for both phases: step, log, evaluate, save, stop.

What a step computes is `step`, what a checkpoint holds `saving`: a run that is killed and resumed goes on to the bit.
`pretrain` and `sft` differ in the `Job` they hand over.
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from pathlib import Path

import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.command import Interrupted
from niels_gpt.device import choose_precision, memory_in_use, synchronize
from niels_gpt.eval import EvalResult
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import Optimizer, set_learning_rate
from niels_gpt.rng import seed_for
from niels_gpt.train.budget import Budget
from niels_gpt.train.evaluation import Evaluation
from niels_gpt.train.job import Job
from niels_gpt.train.parallel import load_weights, whole_model
from niels_gpt.train.pulse import watching
from niels_gpt.train.report import Reporter, StepReport
from niels_gpt.train.sample import Sample
from niels_gpt.train.saving import Origin, Saver
from niels_gpt.train.signals import OUTPUT_CLOSED, StopRequest, catching_signals
from niels_gpt.train.start import eval_shape
from niels_gpt.train.state import RunState, StepResult, TrainResult
from niels_gpt.train.step import Stepper

__all__ = ["Loop", "RunState", "StepResult", "TrainResult", "train"]

LOSS_WINDOW = 50  # steps in the moving average of the logged train_loss
MAX_SKIPPED_IN_A_ROW = 5
MAX_ROLLBACKS = 3  # without ever getting beyond the step where the last one was decided
ROLLBACK_FACTOR = 0.5  # on the learning rate
MOMENTS = 3  # a checkpoint holds about so many numbers for every weight


class Loop:
    """One phase of one run on one process, alone or among the others of `job.world`."""

    def __init__(self, job: Job, *, device: str, reporter: Reporter, resume: Path | None, init: Path | None) -> None:
        """resume: checkpoint to go on from. init: checkpoint whose weights start a fresh run."""
        self.job, self.device, self.reporter = job, device, reporter
        self.options, self.world = job.options, job.world
        self.model, loaded = self._model_of(resume or init)
        self.model.to(device).train()
        self.model.activation_checkpointing = self.options.activation_checkpointing
        self.precision = choose_precision(device, self.options.amp, self.options.amp_dtype)
        self.stepper = Stepper(
            job, self.model, device=device, precision=self.precision, warn=reporter.warn, clock=reporter.clock
        )
        self.evaluation = Evaluation(job, self.model, device=device, precision=self.precision, warn=reporter.warn)
        self.saver = Saver(job, self.stepper, reporter, resume)
        self.state, spent = RunState(), 0.0
        if loaded is not None and resume is not None:
            self.state, spent = self.saver.restore(loaded)
        elif loaded is not None and init is not None:
            self.saver.origin = Origin.of(init, loaded)
        self.budget = self._budget(spent)
        self.stop = StopRequest()  # what all processes have agreed on
        self._heard = StopRequest()  # what this one has been told
        self.recent: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.last_evals: dict[str, EvalResult] = {}
        self._evaluated_now: int | None = None  # step of the last evaluation of this session
        self._best_before: tuple[float | None, int | None] = (None, None)

    def _model_of(self, source: Path | None) -> tuple[GPT, ckpt.Checkpoint | None]:
        """The model of a checkpoint, and the checkpoint; without one, the model that this run begins with."""
        torch.manual_seed(seed_for(self.options.seed, "init"))
        model = GPT(self.job.resolved.model_cfg, self.job.resolved.arch)
        if source is None:
            return model, None
        loaded = self.world.from_main(lambda: ckpt.load_checkpoint(source, device="cpu"))
        ckpt.load_into(model, loaded)
        return model, loaded

    def _budget(self, spent: float) -> Budget:
        batches, rows = eval_shape(self.options)
        return Budget(
            self.options,
            spent_seconds=spent,
            finished_seconds=self.saver.finished_seconds,
            began=self.job.began,
            deadline=self.job.deadline,
            evaluation_in_steps=len(self.job.evals) * batches * rows / self.stepper.microbatches.rows,
            save_bytes=MOMENTS * 4 * self.model.num_parameters,
        )

    @property
    def optimizer(self) -> Optimizer:
        return self.stepper.optimizer

    def train_step(self, step: int) -> StepResult:
        """Forward, backward, clipping and update of step number `step`; see `step.Stepper`."""
        return self.stepper.step(step)

    def run(self) -> TrainResult:
        """Train to the end of the budget. Raises ValueError/OSError if it cannot go on.

        Saves and raises Interrupted after a signal, BrokenPipeError when nobody reads its output any more.
        """
        self.reporter.start(self)
        with catching_signals() as self._heard, watching(self.world, self.options.silence_s):
            if self.state.step % self.options.eval_every == 0 and self.state.evaluated_step != self.state.step:
                self._after_step()  # a signal came before the evaluation that was due
            went_on = False
            while not self._stopping() and not self._is_over():
                went_on = True
                self._one_step()
            if self.saver.is_finished and not went_on:
                self.budget.leave_session_out()
            self._finish()
            if self._stopping() and self.stop.signum == OUTPUT_CLOSED:  # with the last words: no other phase follows
                raise _output_closed()
        return TrainResult(
            self.state,
            self.last_evals,
            self.budget.elapsed,
            ckpt.phase_paths(self.job.phase).latest,
            ckpt.phase_paths(self.job.phase).best,
        )

    def _stopping(self) -> bool:
        """Whether a signal has reached one of the processes, or the output is closed."""
        heard = self._heard.signum or (OUTPUT_CLOSED if self.reporter.output_closed else 0)
        self.stop.signum = self.stop.signum or self.world.largest(heard)
        return bool(self.stop)

    def _is_over(self) -> bool:
        self.budget.agree(self.world)
        if self.budget.done(self.state.step) and self.budget.evaluation_is_estimated:
            if self.evaluate():
                self._save(is_best=True, on_schedule=True)
            self.budget.agree(self.world)  # the evaluation may have been shorter than the time kept back for it
        return self.budget.done(self.state.step)

    def _has_room_for_evaluation(self) -> bool:
        self.budget.agree(self.world)
        return self.budget.has_room_for_evaluation()

    def _one_step(self) -> None:
        state, options = self.state, self.options
        began = time.perf_counter()
        lr = self.budget.learning_rate(state.step) * state.lr_factor
        set_learning_rate(self.optimizer, lr, options)
        with self.reporter.clock("step"):
            result = self.train_step(state.step)
            synchronize(self.device)
        state.step += 1
        state.tokens_seen += result.tokens
        if result.applied:
            self.recent.append(result.loss)
        seconds = time.perf_counter() - began
        self.budget.note_step(seconds)
        self.reporter.step(
            StepReport(
                step=state.step,
                total_steps=None if options.minutes else options.total_steps,
                progress=self.budget.progress(state.step),
                lr=lr,
                loss=result.loss,
                mean_loss=sum(self.recent) / len(self.recent) if self.recent else math.nan,
                grad_norm=result.grad_norm,
                tokens=self.stepper.microbatches.rows * self.job.resolved.model_cfg.T,
                tokens_seen=state.tokens_seen,
                seconds=seconds,
                remaining=self.budget.remaining_seconds(state.step, seconds),
                memory=memory_in_use(self.device) if state.step % options.log_every == 0 else 0,
            )
        )
        if self._note_skips(result):
            self._roll_back()
        else:
            self._after_step()

    def _note_skips(self, result: StepResult) -> bool:
        """Count steps that were not finite; True when there are too many in a row."""
        state = self.state
        if result.applied:
            state.skipped_in_a_row = 0
            if state.step > state.failed_step:
                state.rollbacks = 0
        elif not result.rescaled:
            state.skipped_in_a_row += 1
            state.skipped_steps += 1
            self.reporter.warn(f"step {state.step}: loss or gradient is not finite; the step was skipped")
        return state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def _after_step(self) -> None:
        """Evaluate and save if it is time to."""
        state, options = self.state, self.options
        due = state.step % options.eval_every == 0 and self._has_room_for_evaluation()
        is_best = due and self.evaluate()
        if is_best or state.step % options.ckpt_every == 0:
            self._save(is_best, on_schedule=True)

    def _roll_back(self) -> None:
        """Go back to the last good checkpoint, or the beginning, with a lower learning rate; ValueError in the end."""
        now, phase = self.state, self.job.phase
        if now.rollbacks >= MAX_ROLLBACKS:
            raise ValueError(
                f"step {now.step}: losses or gradients are not finite, also after {MAX_ROLLBACKS} rollbacks with lower"
                f" learning rates; lower training.{phase}.base_lr or switch amp off, look at the data, and start anew"
                " (the last checkpoint is sound)"
            )
        source, is_of_run = self.world.from_main(lambda: self.saver.rollback_point(now))
        model, loaded = self._model_of(source)
        load_weights(self.model, model)
        self.stepper.reset_optimizer()
        self.saver.saved_step = -1
        self.state = self.saver.restore(loaded, quiet=True)[0] if loaded is not None and is_of_run else RunState()
        self.state.lr_factor = now.lr_factor * ROLLBACK_FACTOR
        self.state.rollbacks, self.state.failed_step = now.rollbacks + 1, now.step
        self.state.skipped_steps, self.state.skipped_in_a_row = now.skipped_steps, 0
        self.state.best_val_loss, self.state.best_step = now.best_val_loss, now.best_step
        self.recent.clear()
        self.reporter.warn(
            f"step {now.step}: {now.skipped_in_a_row} steps in a row were not finite; back to"
            f" {source.name if source and is_of_run else 'the beginning'} (step {self.state.step}) with"
            f" {self.state.lr_factor:g} x the learning rate"
        )
        self.reporter.forget_after(self.state.step)

    def evaluate(self) -> bool:
        """Measure every validation source; True if the metric improved (never on a non-finite one)."""
        with self.reporter.clock("evaluation"):
            return self._evaluate()

    def _evaluate(self) -> bool:
        began = time.perf_counter()
        found = self.evaluation.measure(self._heard)
        if found is None:
            self._stopping()
            return False
        self.last_evals, self._evaluated_now = found, self.state.step
        sample = self._sample()
        metric = self.job.metric(found) if found else math.nan
        if found and not math.isfinite(metric):
            name = self.options.best_metric
            self.reporter.warn(f"step {self.state.step}: {name} is no finite number, so this is not the best")
        best = self.state.best_val_loss
        improved = math.isfinite(metric) and (best is None or metric < best)
        self._best_before = (best, self.state.best_step)
        if improved:
            self.state.best_val_loss, self.state.best_step = metric, self.state.step
        self.state.evaluated_step = self.state.step
        self.reporter.evaluated(self.state.step, self.last_evals, metric, improved, sample)
        self.budget.note_evaluation(time.perf_counter() - began)
        return improved and self.options.save_best

    def _sample(self) -> Sample | None:
        """What the model says; on the main process only."""
        if self.job.sample is None:
            return None
        model = whole_model(self.model, self.world)
        return None if model is None else self.job.sample(model)

    def _finish(self) -> None:
        """Last evaluation and save, unless the last step just did both; after a signal, only the save."""
        is_best = False
        if not self.stop and self._evaluated_now != self.state.step:
            is_best = self.evaluate()
        if self.stop:
            self._leave(is_best)
        if self.saver.saved_step != self.state.step or is_best or not self.saver.is_finished:
            self._save(is_best, finished=True)
        self.reporter.finish(self.state.step, self.budget.elapsed)

    def _leave(self, is_best: bool) -> None:
        if self.saver.saved_step != self.state.step or is_best:
            self._save(is_best)
        if self.stop.signum == OUTPUT_CLOSED:
            raise _output_closed()
        raise Interrupted(
            f"stopped by signal {self.stop.signum} after step {self.state.step}; saved to"
            f" {ckpt.phase_paths(self.job.phase).latest}",
            self.stop.exit_code,
        )

    def _save(self, is_best: bool, *, on_schedule: bool = False, finished: bool = False) -> None:
        try:
            with self.reporter.saving(self.state.step):
                saved = self.saver.save(
                    self.state, self.budget, is_best=is_best, on_schedule=on_schedule, finished=finished
                )
            if is_best and not saved:  # a best without its file would keep every later one from being saved
                self.state.best_val_loss, self.state.best_step = self._best_before
        except ckpt.NotFinite as error:
            if not on_schedule:
                raise
            self.reporter.warn(f"step {self.state.step}: not saved: {error}")
            self._roll_back()


def _output_closed() -> BrokenPipeError:
    return BrokenPipeError(errno.EPIPE, "the output was closed")


def train(
    job: Job, *, device: str, reporter: Reporter, resume: Path | None = None, init: Path | None = None
) -> TrainResult:
    """Run one phase: fresh, from another model's weights (`init`), or on from its own checkpoint (`resume`)."""
    job.world.on_main(lambda: ckpt.prepare_phase(job.phase))
    settings = job.resolved.settings.model_dump(mode="json")
    job.world.check_same(settings=settings, data=dict(job.data), torch=str(torch.__version__), device=device)
    return Loop(job, device=device, reporter=reporter, resume=resume, init=init).run()
