"""One optimizer step: forward and backward over its microbatches, clipping, update. What it does depends on its number.

A step is a function of (weights, optimizer state, step number): batches and dropout are seeded by the number. What goes
wrong before the update is undone by dropping the gradients, so a step can be tried again in another way: in smaller
microbatches when memory runs out, without the compiler when that fails.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from niels_gpt import contention
from niels_gpt.batching import Batch
from niels_gpt.device import Precision
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.optim import build_optimizer, whole
from niels_gpt.rng import seed_for
from niels_gpt.train import parallel
from niels_gpt.train.clock import ActivityClock
from niels_gpt.train.job import Job
from niels_gpt.train.memory import DoesNotFit, advice, free_memory, is_out_of_memory
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.state import StepResult

REHEARSALS = 2
SMALLEST_SCALE = 1.0  # below it fp16 overflows without any scaling: that is no search for a scale any more


class Stepper:
    """A model on its device with its optimizer, ready to take steps of a job."""

    def __init__(
        self,
        job: Job,
        model: GPT,
        *,
        device: str,
        precision: Precision,
        warn: Callable[[str], None] = print,
        clock: ActivityClock | None = None,
    ) -> None:
        """clock: told what time goes into getting batches."""
        self.job, self.model, self.device, self.precision, self.warn = job, model, device, precision, warn
        self.options, self.world, self.clock = job.options, job.world, clock or ActivityClock()
        self.shards = self.world.size > 1 and self.options.parallel == "fsdp"
        if self.shards:
            parallel.shard(model, precision)
        self.scaler = torch.amp.GradScaler(device) if precision.needs_scaler else None
        ns_dtype = torch.bfloat16 if precision.dtype is torch.bfloat16 else torch.float32
        self.optimizer = build_optimizer(model, self.options, ns_dtype=ns_dtype)
        self._fresh = copy.deepcopy(
            (self.optimizer.state_dict(), None if self.scaler is None else self.scaler.state_dict())
        )
        self.compiled = self.options.compile
        if self.compiled:
            model.compile_blocks()
        self.forward: Callable[..., Tensor] = model
        self._together: Callable[..., Tensor] | None = None  # `forward` behind DDP
        self._rehearsals = 0 if self.world.size == 1 or self.shards else REHEARSALS  # still to come
        cut = Microbatches(self.options.micro_B, self.options.accum_steps)
        self.microbatches = cut.shared_out(self.world.rank, self.world.size)

    def reset_optimizer(self) -> None:
        """Forget all moments and the scale, as at the beginning of a run."""
        optimizer, scaler = copy.deepcopy(self._fresh)
        self.optimizer.load_state_dict(optimizer)
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(scaler)

    def step(self, step: int) -> StepResult:
        """Take step number `step`, counted from 0. A step that is not finite leaves no trace."""
        contention.look()
        while True:
            with self.clock("data"):
                batches = self._batches(step)
            valid = int(self.world.sum(sum(int((batch.y != IGNORED).sum()) for _, batch in batches))[0])
            if not valid:
                raise ValueError(f"step {step + 1}: no batch holds a token to learn from; check the data of this phase")
            failure = self._rehearsed(step, batches, valid) if self._rehearsals else None
            if failure is None:
                try:
                    nats = self._backward_all(step, batches, valid)
                except Exception as error:
                    if self.world.size > 1 and is_out_of_memory(error):
                        raise DoesNotFit(f"step {step + 1}: out of memory: {advice(self.job.phase)}") from None
                    if self.world.size > 1 or not self._can_be_helped(error):
                        raise
                    failure = _Failure.of(error)
                else:
                    return self._updated(nats, valid)
            self.optimizer.zero_grad(set_to_none=True)
            self._try_otherwise(step, failure)

    def _can_be_helped(self, error: Exception) -> bool:
        return self.compiled or is_out_of_memory(error)

    def _rehearsed(self, step: int, batches: list[tuple[int, Batch]], valid: int) -> _Failure | None:
        """Try a microbatch on every process without exchanging gradients; what failed, if it did in one of them.

        Amid an exchange nothing can be tried otherwise, since the others wait in it. So what may fail, the compiler and
        memory, is tried before the first step, and before the second, by when the optimizer has its moments.
        """
        failure = None
        try:
            self._backward(step, *batches[0], valid, self.forward)
        except Exception as error:
            if not self._can_be_helped(error):
                raise
            failure = _Failure.of(error)
        self.optimizer.zero_grad(set_to_none=True)
        found = [failure for failure in self.world.gather(failure) if failure is not None]
        if found:
            return found[0]
        self._rehearsals -= 1
        if self._together is None:
            self._together = parallel.replicated(self.forward, self.world)
            # DDP regroups its buckets after the first exchange, and with it the order of the sums of three processes
            # or more: a resumed run would differ from an undisturbed one in the last bits.
            self._backward_all(step, batches[:1], valid)
            self.optimizer.zero_grad(set_to_none=True)
        return None

    def _backward_all(self, step: int, batches: list[tuple[int, Batch]], valid: int) -> float:
        """The gradient of the step, over all processes; returns the summed nats of this one."""
        forward = self._together or self.forward
        nats = 0.0
        for microbatch, batch in batches:
            with parallel.backward_pass(forward, self.model, last=microbatch == batches[-1][0]):
                nats += self._backward(step, microbatch, batch, valid, forward)
        return nats

    def _batches(self, step: int) -> list[tuple[int, Batch]]:
        """Number within the step and rows of each microbatch."""
        cut = self.microbatches
        return [(m, self._checked(self.job.batch(first, cut.size))) for m, first in cut.of_step(step)]

    def _backward(self, step: int, microbatch: int, batch: Batch, valid: int, forward: Callable[..., Tensor]) -> float:
        """Add one microbatch's gradient to those of the step; returns its summed nats."""
        torch.manual_seed(seed_for(self.options.seed, "dropout", step, microbatch))
        batch = batch.to(self.device)
        with self.precision.autocast():
            total: Tensor = forward(batch.x, batch.y, segment=batch.segment)
        loss = total / valid  # so that the gradient is that of the mean over all of the step's tokens
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        return float(total.detach())

    def _updated(self, nats: float, valid: int) -> StepResult:
        try:
            return self._update(nats, valid)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise DoesNotFit(f"the optimizer's update ran out of memory: {advice(self.job.phase)}")

    def _update(self, nats: float, valid: int) -> StepResult:
        """Clip and update, if everything is finite; then drop the gradients."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        norm = self._clip()
        nats, not_finite = self.world.sum(nats, not (math.isfinite(nats) and math.isfinite(norm)))
        finite = not not_finite  # for all processes, whichever of them saw it
        rescaled = False
        if self.scaler is None:
            if finite:
                self.optimizer.step()
        else:
            rescaled = not finite and math.isfinite(nats) and self.scaler.get_scale() > SMALLEST_SCALE
            if finite:
                self.scaler.step(self.optimizer)  # type: ignore[arg-type]
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(nats / valid, norm, valid, finite, rescaled)

    def _clip(self) -> float:
        """Scale the gradients down to `grad_clip` if they are above it; returns their norm before that."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        norm = float(whole(total))
        if norm > self.options.grad_clip:  # otherwise all would be multiplied by 1: a pass over them for nothing
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.options.grad_clip, total)
        return norm

    def _try_otherwise(self, step: int, failure: _Failure) -> None:
        """Change what may let the same step succeed, with a warning; raises if there is nothing to change."""
        if failure.out_of_memory:
            free_memory(self.device)
            self._shrink(step, failure)
        else:
            self.compiled = False
            self.model.leave_blocks_eager()
            self.warn(
                f"torch.compile failed ({failure.reason}); going on without it. Set"
                f" training.{self.job.phase}.compile to false to start this way"
            )

    def _shrink(self, step: int, failure: _Failure) -> None:
        before, after = self.microbatches, self.microbatches.smaller()
        phase = self.job.phase
        if after is None:
            raise DoesNotFit(
                f"step {step + 1}: out of memory with microbatches of {before.size} rows, which cannot be made"
                f" smaller ({failure.reason}): {advice(phase)}"
            )
        self.microbatches = after
        self.warn(
            f"step {step + 1}: out of memory with microbatches of {before.size} rows; going on with {after.size},"
            f" {after.count} to a step: the same batch. Set training.{phase}.micro_B to {after.size} and accum_steps"
            f" to {after.count} to start this way"
        )

    def _checked(self, batch: Batch) -> Batch:
        V = self.job.resolved.model_cfg.V
        low, high = int(batch.x.min()), max(int(batch.x.max()), int(batch.y.max()))
        if low < 0 or high >= V:
            raise ValueError(
                f"a batch holds token id {high if high >= V else low}, the model knows 0..{V - 1} (model.V={V}); "
                "the caches were built for a larger vocabulary: raise model.V or rebuild them"
            )
        return batch


@dataclass(frozen=True)
class _Failure:
    """What is kept of an error: its frames hold the tensors that memory is needed for."""

    out_of_memory: bool
    reason: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(is_out_of_memory(error), _first_line(error))


def _first_line(error: Exception) -> str:
    """The reason in one line: the innermost error of a chain of them, which a compiler wraps several times."""
    inner: BaseException = error
    while (next_one := inner.__cause__ or getattr(inner, "inner_exception", None)) is not None:
        inner = next_one
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0][:200]}" if lines else type(inner).__name__
