"""Tables on stdout that are whole wherever they are read: a terminal, a pipe, a file."""

from __future__ import annotations

from rich.console import Console

WIDTH = 10_000  # columns, more than any table needs


def wide_console() -> Console:
    """A console on stdout that cuts nothing: lines too long for a terminal are wrapped by it."""
    return Console(highlight=False, soft_wrap=True, width=WIDTH)
