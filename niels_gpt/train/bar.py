"""The progress bar of a run: one line that never wraps, drawn by the loop itself and not by a thread beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

REFRESH_SECONDS = 1.0  # drawing costs about 2 ms, which a quickstart step would notice ten times a second
BAR_WIDTH = 20
BAR_SPACE = BAR_WIDTH + 8  # with the percentage and the gaps
SEPARATOR = "  "


class Bar:
    """Phase, bar, percentage, and as many of the parts as there is room for."""

    def __init__(self, phase: str, console: Console) -> None:
        self._phase, self._console = phase, console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.percentage:3.0f}%"),
        )
        info = TextColumn("{task.fields[info]}", markup=False)
        self._progress = Progress(*columns, info, console=console, transient=True, auto_refresh=False)
        self._progress.start()
        self._task = self._progress.add_task(phase, total=1.0, info="")
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether it is time to draw again."""
        return time.monotonic() >= self._next

    def show(self, progress: float, parts: Sequence[str]) -> None:
        """progress: 0..1. parts: the most wanted first."""
        room = self._console.width - cell_len(self._phase) - BAR_SPACE
        self._progress.update(self._task, completed=progress, info=fitting(parts, room), refresh=True)
        self._next = time.monotonic() + REFRESH_SECONDS

    def stop(self) -> None:
        self._progress.stop()


def fitting(parts: Sequence[str], room: int) -> str:
    """The first parts that fit into `room` cells together."""
    text = ""
    for part in parts:
        longer = f"{text}{SEPARATOR}{part}" if text else part
        if cell_len(longer) > room:
            break
        text = longer
    return text
