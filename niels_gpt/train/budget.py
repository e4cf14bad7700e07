"""How far a run has come, by steps or by the clock: the learning rate and the end follow from that alone."""

from __future__ import annotations

import time

from niels_gpt.lr_schedule import lr_at_step
from niels_gpt.settings import PhaseSettings
from niels_gpt.train.distributed import World


class Budget:
    """A run of `total_steps` steps or, when the settings give `minutes`, of that much time.

    A time budget covers everything from the start of the phase: steps, evaluations, saves, and a reserve for the last
    evaluation and save. The time earlier sessions of a resumed run have used counts. Under a time budget the schedule
    runs on the clock, so it is always finished when the time is.
    """

    def __init__(self, options: PhaseSettings, *, spent_seconds: float = 0.0) -> None:
        self.options = options
        self.seconds = None if options.minutes is None else options.minutes * 60
        self.reserve = 0.0  # seconds kept back for the final evaluation and save
        self._started = time.perf_counter() - spent_seconds
        self._agreed: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds this run has used, earlier sessions included."""
        return time.perf_counter() - self._started

    def agree(self, world: World) -> None:
        """Let all processes of a run go by the main one's clock until they agree again."""
        if self.seconds is not None and world.size > 1:
            self._agreed, self.reserve = world.from_main(lambda: (self.elapsed, self.reserve))

    def progress(self, step: int) -> float:
        """0 at the start, 1 when the run is over; `step` is the number of steps done."""
        if self.seconds is None:
            return step / self.options.total_steps
        elapsed = self.elapsed if self._agreed is None else self._agreed
        return min(1.0, elapsed / max(self.seconds - self.reserve, 1e-9))

    def remaining_seconds(self, step: int, seconds_per_step: float) -> float:
        """Expected time until the end."""
        if self.seconds is None:
            return (self.options.total_steps - step) * seconds_per_step
        return max(0.0, self.seconds - self.elapsed)

    def done(self, step: int) -> bool:
        return self.progress(step) >= 1.0

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step about to be taken (0-based)."""
        options = self.options
        at = step if self.seconds is None else self.progress(step) * options.total_steps
        return lr_at_step(
            at,
            options.total_steps,
            base_lr=options.base_lr,
            warmup_steps=options.warmup_steps,
            min_lr=options.min_lr,
            shape=options.lr_shape,
            decay_fraction=options.decay_fraction,
        )
