"""One optimizer step: forward and backward over its microbatches, clipping, update. What it does depends on its number.

A step is a function of (weights, optimizer state, step number): batches and dropout are seeded by the number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from niels_gpt.batching import Batch
from niels_gpt.device import Precision
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.optim import build_optimizer, whole
from niels_gpt.rng import seed_for
from niels_gpt.train import parallel
from niels_gpt.train.job import Job
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.state import StepResult


class Stepper:
    """A model on its device with its optimizer, ready to take steps of a job."""

    def __init__(self, job: Job, model: GPT, *, device: str, precision: Precision) -> None:
        self.job, self.model, self.device, self.precision = job, model, device, precision
        self.options, self.world = job.options, job.world
        shards = self.world.size > 1 and self.options.parallel == "fsdp"
        if shards:
            parallel.shard(model, precision)
        self.scaler = torch.amp.GradScaler(device) if precision.needs_scaler else None
        ns_dtype = torch.bfloat16 if precision.dtype is torch.bfloat16 else torch.float32
        self.optimizer = build_optimizer(model, self.options, ns_dtype=ns_dtype)
        forward = torch.compile(model) if self.options.compile else model
        self.forward = forward if shards else parallel.replicated(forward, self.world)
        cut = Microbatches(self.options.micro_B, self.options.accum_steps)
        self.microbatches = cut.shared_out(self.world.rank, self.world.size)

    def step(self, step: int) -> StepResult:
        """Take step number `step`, counted from 0. A step that is not finite leaves no trace."""
        cut = self.microbatches
        batches = [(m, self._checked(self.job.batch(first, cut.size))) for m, first in cut.of_step(step)]
        valid = int(self.world.sum(sum(int((batch.y != IGNORED).sum()) for _, batch in batches))[0])
        if not valid:
            raise ValueError(f"step {step}: no batch holds a token to learn from; check the data of this phase")
        nats = 0.0
        for microbatch, batch in batches:
            with parallel.backward_pass(self.forward, self.model, last=microbatch == batches[-1][0]):
                nats += self._backward(step, microbatch, batch, valid)
        return self._update(nats, valid)

    def _backward(self, step: int, microbatch: int, batch: Batch, valid: int) -> float:
        """Add one microbatch's gradient to those of the step; returns its summed nats."""
        torch.manual_seed(seed_for(self.options.seed, "dropout", step, microbatch))
        batch = batch.to(self.device)
        with self.precision.autocast():
            total: Tensor = self.forward(batch.x, batch.y, segment=batch.segment)
        loss = total / valid  # so that the gradient is that of the mean over all of the step's tokens
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        return float(total.detach())

    def _update(self, nats: float, valid: int) -> StepResult:
        """Clip and update, if everything is finite; then drop the gradients."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)))
        nats, not_finite = self.world.sum(nats, not (math.isfinite(nats) and math.isfinite(norm)))
        finite = not not_finite  # the same on all processes, whichever of them saw it
        if finite and self.scaler is not None:
            self.scaler.step(self.optimizer)  # type: ignore[arg-type]
        elif finite:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
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
