"""One training at a time in a folder: two would write the same checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from niels_gpt import paths
from niels_gpt.train.distributed import ALONE, World


@contextmanager
def only_training_here(world: World = ALONE) -> Iterator[None]:
    """Be the only run that writes to `paths.CHECKPOINT_DIR`; within itself, as a phase of a pipeline is, it is nothing.

    The main process of a run holds the lock, beside the folder: the folder itself may be moved away meanwhile. The
    system lets go of it when that process dies. OSError, on all processes, if another run is at work.
    """
    held: list[FileLock] = []
    world.on_main(lambda: held.extend(_acquired()))
    try:
        yield
    finally:
        for lock in held:
            _release(lock)


def _acquired() -> list[FileLock]:
    """The lock, taken; none where the file system has no locks or takes no file."""
    folder = paths.CHECKPOINT_DIR.resolve()
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path, timeout=0, is_singleton=True, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(
            f"another training{_holder(path)} is writing to {paths.CHECKPOINT_DIR}/; wait for it or work in another"
            " folder"
        ) from None
    except OSError:
        return []
    if lock.lock_counter == 1:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}")
    return [lock]


def _holder(path: Path) -> str:
    with suppress(OSError):
        if who := path.read_text(encoding="utf-8", errors="replace").strip():
            return f" ({who})"
    return ""


def _release(lock: FileLock) -> None:
    if lock.lock_counter == 1:
        with suppress(OSError):  # who has opened the unlinked file notices, and locks a new one
            Path(lock.lock_file).unlink()
    lock.release()
