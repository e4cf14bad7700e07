"""What a build says while it goes on: documents, MB/s, tokens and the time left, where somebody watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from niels_gpt.cache.shared import Done, Progress


@contextmanager
def watching(name: str) -> Iterator[Progress]:
    """A line on stderr that says how far the build of `name` is, where stderr is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    left = TimeRemainingColumn(compact=True)
    with Bar(
        *columns, TextColumn("left"), left, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)
        started, first = time.monotonic(), 0

        def update(done: Done) -> None:
            nonlocal started, first
            if not first:
                started, first = time.monotonic(), done.n_bytes  # a resumed build starts with what it has
            total = done.of_tokens or done.of_documents
            completed = done.n_tokens if done.of_tokens else done.documents
            bar.update(task, description=describe(name, done, done.n_bytes - first, started), completed=completed)
            if total is not None:
                bar.update(task, total=total)

        yield update


def describe(name: str, done: Done, new_bytes: int, started: float) -> str:
    """One line on how far a build is; `new_bytes` of text were read since `started`."""
    parts = [f"{name} {done.what}: {done.documents:,} documents"]
    if done.n_tokens:
        parts.append(f"{done.n_tokens:,} tokens")
    seconds = time.monotonic() - started
    if new_bytes and seconds > 0:
        parts.append(f"{new_bytes / 1e6 / seconds:.1f} MB/s")
    return ", ".join(parts)
