"""Output on stdout: whole wherever it is read, and an error that a program can deal with when nobody reads it."""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

from rich.console import Console

WIDTH = 10_000  # columns, more than any table needs


class OutputConsole(Console):
    """A console on stdout whose lines are left to the terminal to wrap; `options` are those of rich."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True, **options})

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError, for the program to save and to say so; rich itself would leave on the spot."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def wide_console() -> OutputConsole:
    """A console on stdout that cuts nothing: lines too long for a terminal are wrapped by it."""
    return OutputConsole(width=WIDTH)
