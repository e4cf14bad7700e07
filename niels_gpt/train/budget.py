"""How far a run has come, by steps or by the clock: the learning rate and the end follow from that alone."""

from __future__ import annotations

import statistics
import time
from collections import deque

from niels_gpt.lr_schedule import lr_at_step
from niels_gpt.settings import PhaseSettings
from niels_gpt.train.distributed import World

FORWARD_SHARE = 0.5  # an evaluated row costs at most this much of a trained one, until an evaluation has been timed
SAVE_BYTES_PER_SECOND = 100e6  # of a checkpoint, until a save has been timed: a slow disk
LARGEST_RESERVE = 0.5  # of the budget
MARGIN = 1.2  # on what the last evaluation and save took before


class Budget:
    """A run of `total_steps` steps or, when the settings give `minutes`, of that much time.

    A time budget covers everything from the start of the phase: opening caches, compiling, steps, evaluations, saves,
    and a reserve for the last step, evaluation and save. The time earlier sessions of a resumed run have used counts.
    Under a time budget the schedule runs on the clock, so it is always finished when the time is.
    """

    def __init__(
        self,
        options: PhaseSettings,
        *,
        spent_seconds: float = 0.0,
        finished_seconds: float | None = None,
        began: float | None = None,
        deadline: float | None = None,
        evaluation_in_steps: float = 0.0,
        save_bytes: int = 0,
    ) -> None:
        """spent_seconds: by earlier sessions. finished_seconds: the time budget that this run has already completed.

        began: `time.perf_counter()` when the phase started. deadline: `time.time()` at which it must be over, on the
        wall clock, so that a suspended machine is not late; `options.minutes` must agree with it.
        evaluation_in_steps, save_bytes: what one evaluation and one save amount to, for estimates.
        """
        self.options, self.deadline = options, deadline
        self.seconds = None if options.minutes is None else options.minutes * 60
        self._over = self.seconds is not None and finished_seconds is not None and self.seconds <= finished_seconds
        self._spent, self._started = spent_seconds, (time.perf_counter() if began is None else began) - spent_seconds
        self._stands = False
        self._steps: deque[float] = deque(maxlen=9)
        self._warm = False  # the first step of a session warms up or compiles, and tells nothing of the next
        self._evaluation_in_steps = evaluation_in_steps * FORWARD_SHARE
        self._evaluation: float | None = None
        self._save = save_bytes / SAVE_BYTES_PER_SECOND
        self._agreed: tuple[float, float, float] | None = None  # seconds left, reserve, evaluation_seconds

    @property
    def elapsed(self) -> float:
        """Seconds this run has used, earlier sessions included."""
        return self._spent if self._stands else time.perf_counter() - self._started

    def leave_session_out(self) -> None:
        """Count nothing of this session: the run was finished before it."""
        self._stands = True

    def agree(self, world: World) -> None:
        """Let all processes of a run go by the main one's clock until they agree again."""
        if self.seconds is not None and world.size > 1:
            self._agreed = None
            self._agreed = world.from_main(lambda: (self._left(), self.reserve, self.evaluation_seconds))

    def note_step(self, seconds: float) -> None:
        if self._warm:
            self._steps.append(seconds)
        self._warm = True

    def note_evaluation(self, seconds: float) -> None:
        self._evaluation = max(self._evaluation or 0.0, seconds)

    def note_save(self, seconds: float) -> None:
        self._save = seconds

    @property
    def evaluation_seconds(self) -> float:
        """What an evaluation takes: the longest so far, or an estimate from the steps."""
        if self._agreed is not None:
            return self._agreed[2]
        return self._step * self._evaluation_in_steps if self._evaluation is None else self._evaluation

    @property
    def evaluation_is_estimated(self) -> bool:
        """Whether time is kept back for an evaluation without knowing how much it takes."""
        return self.seconds is not None and not self._over and self._evaluation is None

    @property
    def _step(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.0

    @property
    def reserve(self) -> float:
        """Seconds kept back for the step that is running, the last evaluation and the last save."""
        if self._agreed is not None:
            return self._agreed[1]
        needed = self._step + MARGIN * (self.evaluation_seconds + self._save)
        return needed if self.seconds is None else min(needed, LARGEST_RESERVE * self.seconds)

    def _left(self) -> float:
        """Seconds until the time budget is used up."""
        assert self.seconds is not None
        if self._agreed is not None:
            return self._agreed[0]
        return self.seconds - self.elapsed if self.deadline is None else self.deadline - time.time()

    def has_room_for_evaluation(self) -> bool:
        """Whether an evaluation now leaves time for the last one; without a time budget, always."""
        return self.seconds is None or self._left() > MARGIN * self.evaluation_seconds + self.reserve

    def progress(self, step: int) -> float:
        """0 at the start, 1 when the run is over; `step` is the number of steps done."""
        if self.seconds is None:
            return step / self.options.total_steps
        if self._over:
            return 1.0
        return min(1.0, max(0.0, (self.seconds - self._left()) / (self.seconds - self.reserve)))

    def remaining_seconds(self, step: int, seconds_per_step: float) -> float:
        """Expected time until the end."""
        if self.seconds is None:
            return (self.options.total_steps - step) * seconds_per_step
        return max(0.0, self._left())

    def done(self, step: int) -> bool:
        """Whether the run is over after `step` steps; never before the first, however little time there was."""
        return step > 0 and self.progress(step) >= 1.0

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
