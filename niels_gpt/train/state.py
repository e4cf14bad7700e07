"""The records of a run: what changes while it goes on, what a step was, how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt.eval import EvalResult


@dataclass
class RunState:
    """What changes while a run goes on, besides weights and optimizer state. Saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0  # supervised targets
    skipped_steps: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int = 0  # of the last evaluation that was completed
    skipped_in_a_row: int = 0
    lr_factor: float = 1.0  # lowered by every rollback
    rollbacks: int = 0  # since training last got beyond `failed_step`
    failed_step: int = 0  # where the last rollback was decided
    good_step: int | None = None  # newest checkpoint on schedule, not amid skipped steps; None = the beginning


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per supervised token
    grad_norm: float
    tokens: int
    applied: bool  # False when the loss or a gradient was not finite
    rescaled: bool = False  # not applied because fp16 overflowed at this scale, which the scaler has now lowered


@dataclass(frozen=True)
class TrainResult:
    state: RunState
    last_evals: dict[str, EvalResult]
    elapsed: float  # seconds, earlier sessions included
    latest_path: Path
    best_path: Path

    def record(self) -> dict[str, Any]:
        """What every phase returns to its caller."""
        return {
            "final_step": self.state.step,
            "best_val_loss": self.state.best_val_loss,
            "latest_path": self.latest_path,
            "best_path": self.best_path,
            "tokens_seen": self.state.tokens_seen,
            "seconds": self.elapsed,
        }
