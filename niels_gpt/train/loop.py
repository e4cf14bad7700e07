"""THE training loop, for both phases: step, log, evaluate, save, stop.

What a step computes is `step`, what a checkpoint holds `saving`: a run that is killed and resumed goes on to the bit.
`pretrain` and `sft` differ in the `Job` they hand over.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path

import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.device import choose_precision, memory_in_use, synchronize
from niels_gpt.eval import EvalResult
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import Optimizer, set_learning_rate
from niels_gpt.rng import seed_for
from niels_gpt.train.budget import Budget
from niels_gpt.train.job import Job
from niels_gpt.train.parallel import evaluate_together
from niels_gpt.train.pulse import watching
from niels_gpt.train.report import Reporter, StepReport
from niels_gpt.train.saving import Saver
from niels_gpt.train.signals import StopRequest, catching_signals
from niels_gpt.train.state import Interrupted, RunState, StepResult, TrainResult
from niels_gpt.train.step import Stepper

__all__ = ["Interrupted", "Loop", "RunState", "StepResult", "TrainResult", "train"]

LOSS_WINDOW = 50  # steps in the moving average of the logged train_loss
MAX_SKIPPED_IN_A_ROW = 5


class Loop:
    """One phase of one run on one process, alone or among the others of `job.world`."""

    def __init__(self, job: Job, *, device: str, reporter: Reporter, resume: Path | None, init: Path | None) -> None:
        """resume: checkpoint to go on from. init: checkpoint whose weights start a fresh run."""
        self.job, self.device, self.reporter = job, device, reporter
        self.options, self.world = job.options, job.world
        torch.manual_seed(seed_for(self.options.seed, "init"))
        self.model = GPT(job.resolved.model_cfg, job.resolved.arch)
        source = resume or init
        loaded = None
        if source is not None:
            loaded = self.world.from_main(lambda: ckpt.load_checkpoint(source, device="cpu"))
        if loaded is not None:
            ckpt.validate_model_config_match(loaded["model_cfg"], job.resolved.model_cfg)
            self.model.load_state_dict(ckpt.build_model(loaded).state_dict())
        self.model.to(device).train()
        self.model.activation_checkpointing = self.options.activation_checkpointing
        self.precision = choose_precision(device, self.options.amp, self.options.amp_dtype)
        self.stepper = Stepper(job, self.model, device=device, precision=self.precision)
        self.saver = Saver(job, self.stepper, reporter, resume)
        self.state, spent = RunState(), 0.0
        if loaded is not None and resume is not None:
            self.state, spent = self.saver.restore(loaded)
        self.budget = Budget(self.options, spent_seconds=spent)
        self.recent: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.last_evals: dict[str, EvalResult] = {}

    @property
    def optimizer(self) -> Optimizer:
        return self.stepper.optimizer

    def train_step(self, step: int) -> StepResult:
        """Forward, backward, clipping and update of step number `step`; see `step.Stepper`."""
        return self.stepper.step(step)

    def run(self) -> TrainResult:
        """Train to the end of the budget. Raises Interrupted after a signal, ValueError/OSError if it cannot go on."""
        self.reporter.start(self)
        with catching_signals() as stop, watching(self.world, self.options.silence_s):
            while not self._done():
                self._one_step()
                if signum := self.world.largest(stop.signum):
                    self._leave(StopRequest(signum))
            self._finish()
        return TrainResult(
            self.state,
            self.last_evals,
            self.budget.elapsed,
            ckpt.phase_paths(self.job.phase).latest,
            ckpt.phase_paths(self.job.phase).best,
        )

    def _done(self) -> bool:
        self.budget.agree(self.world)
        return self.budget.done(self.state.step)

    def _one_step(self) -> None:
        state, options = self.state, self.options
        began = time.perf_counter()
        lr = self.budget.learning_rate(state.step)
        set_learning_rate(self.optimizer, lr, options)
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
                tokens=self.stepper.microbatches.rows * self.job.resolved.model_cfg.T,
                tokens_seen=state.tokens_seen,
                seconds=time.perf_counter() - began,
                remaining=self.budget.remaining_seconds(state.step, time.perf_counter() - began),
                memory=memory_in_use(self.device) if state.step % options.log_every == 0 else 0,
            )
        )
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

    def evaluate(self) -> bool:
        """Measure every validation source; True if the metric improved (never on a non-finite one)."""
        began = time.perf_counter()
        self.last_evals = {
            name: evaluate_together(self.model, batches(), self.world, device=self.device, precision=self.precision)
            for name, batches in self.job.evals.items()
        }
        metric = self.job.metric(self.last_evals) if self.last_evals else math.nan
        best = self.state.best_val_loss
        improved = math.isfinite(metric) and (best is None or metric < best)
        if improved:
            self.state.best_val_loss, self.state.best_step = metric, self.state.step
        self.reporter.evaluated(self.state.step, self.last_evals, metric, improved)
        self.budget.reserve = max(self.budget.reserve, 1.2 * (time.perf_counter() - began))
        return improved and self.options.save_best

    def _finish(self) -> None:
        """Last evaluation and save, unless the last step just did both."""
        is_best = self.evaluate() if self.state.step % self.options.eval_every else False
        if self.saver.saved_step != self.state.step or is_best:
            self._save(is_best, final=True)
        self.reporter.finish(self.state.step, self.budget.elapsed)

    def _leave(self, stop: StopRequest) -> None:
        if self.saver.saved_step != self.state.step:
            self._save(is_best=False, final=True)
        raise Interrupted(
            f"stopped by signal {stop.signum} after step {self.state.step}; saved to "
            f"{ckpt.phase_paths(self.job.phase).latest}. Run the same command again to go on from there",
            stop.exit_code,
        )

    def _save(self, is_best: bool, *, final: bool) -> None:
        self.saver.save(self.state, self.budget, is_best=is_best, final=final)


def train(
    job: Job, *, device: str, reporter: Reporter, resume: Path | None = None, init: Path | None = None
) -> TrainResult:
    """Run one phase: fresh, from another model's weights (`init`), or on from its own checkpoint (`resume`)."""
    job.world.on_main(lambda: ckpt.prepare_phase(job.phase))
    settings = job.resolved.settings.model_dump(mode="json")
    job.world.check_same(settings=settings, data=dict(job.data), torch=str(torch.__version__), device=device)
    return Loop(job, device=device, reporter=reporter, resume=resume, init=init).run()
