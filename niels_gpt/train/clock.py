"""Where the time of a run goes: every second of it belongs to exactly one activity."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.table import Table

ACTIVITIES = ("step", "data", "evaluation", "logging", "saving", "other")
WATCHED = ("data", "evaluation", "logging", "saving")  # what is not training, and should cost next to nothing


class ActivityClock:
    """`with clock("saving"): ...` charges what happens inside to that activity, and not to the one around it."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = "other", time.perf_counter()

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        before = self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, activity: str) -> str:
        now = time.perf_counter()
        before = self._activity
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add what earlier sessions of a resumed run spent."""
        for activity in ACTIVITIES:
            self._seconds[activity] += seconds.get(activity, 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds of each activity so far, the one that is going on included."""
        self._switch(self._activity)
        return dict(self._seconds)


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each activity's part of the whole, 0..1."""
    total = sum(seconds.values())
    return {name: seconds.get(name, 0.0) / total if total else 0.0 for name in ACTIVITIES}


def time_table(seconds: Mapping[str, float]) -> Table:
    """Where the time went, for people."""
    table = Table(title="where the time went", title_justify="left")
    for column in ("activity", "seconds", "share"):
        table.add_column(column, justify="left" if column == "activity" else "right")
    for activity, share in shares(seconds).items():
        table.add_row(activity, f"{seconds.get(activity, 0.0):,.1f}", f"{share:.2%}")
    table.add_row("all", f"{sum(seconds.values()):,.1f}", "")
    return table
