"""Where the time of a run goes: every second of it belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.table import Table

PHASES = ("step", "data", "evaluation", "logging", "saving", "other")
WATCHED = ("data", "evaluation", "logging", "saving")  # what is not training, and should cost next to nothing


class PhaseClock:
    """`with clock("saving"): ...` charges what happens inside to that phase, and not to the one around it."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "other", time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        now = time.perf_counter()
        before = self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add what earlier sessions of a resumed run spent."""
        for phase in PHASES:
            self._seconds[phase] += seconds.get(phase, 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, the one that is going on included."""
        self._switch(self._phase)
        return dict(self._seconds)


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each phase's part of the whole, 0..1."""
    total = sum(seconds.values())
    return {phase: seconds.get(phase, 0.0) / total if total else 0.0 for phase in PHASES}


def time_table(seconds: Mapping[str, float]) -> Table:
    """Where the time went, for people."""
    table = Table(title="where the time went", title_justify="left")
    for column in ("phase", "seconds", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, share in shares(seconds).items():
        table.add_row(phase, f"{seconds.get(phase, 0.0):,.1f}", f"{share:.2%}")
    table.add_row("all", f"{sum(seconds.values()):,.1f}", "")
    return table
