"""Building a folder beside the one that it replaces, so that a kill leaves the old folder or the new one, never a mix.

A folder cannot be renamed onto a folder that has files in it, so a swap takes two renames:

1. build `.NAME.new` beside the target and make it durable; its last file is `LAST_FILE`;
2. rename the target to `.NAME.old`, then `.NAME.new` to the target;
3. delete `.NAME.old`.

If the target is missing while `.NAME.old` and a finished `.NAME.new` are there, `.NAME.new` is the folder to read, and
the next build finishes the swap. One process builds at a time: `.NAME.lock` is held meanwhile, and says who holds it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from niels_gpt.files import fsync_folder

LAST_FILE = "meta.json.sha256"
JOURNAL = "journal.json"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Be the only process that builds `target`; waits, and says for whom, while another one does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):
            who = path.read_text().strip() or "another process"
            print(f"{target} is being built by {who}; waiting until it is done", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if lock.lock_counter == 1:
            now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # who waits for an unlinked lock notices, and locks the new file
                path.unlink()
        lock.release()


@contextmanager
def replacing_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` when the block ends well; otherwise it is removed.

    With `resume`, a folder that holds a `JOURNAL` is kept when the block is interrupted, and yielded again the next
    time; in the end the journal is removed. The caller makes the files durable, this the folders and renames.
    """
    with locked(target):
        sweep_folder(target, resume=resume)
        new, old = _beside(target)
        new.mkdir(exist_ok=True)
        try:
            yield new
            for folder, _, _ in os.walk(new):
                fsync_folder(Path(folder))
            if target.is_dir():
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            fsync_folder(target.parent)
            sweep_folder(target)
        except BaseException as error:
            if not resume or isinstance(error, ValueError) or not (new / JOURNAL).is_file():
                shutil.rmtree(new, ignore_errors=True)
            raise


def whole_folder(target: Path) -> Path:
    """Where the content of `target` is: itself, or the new folder of a swap that was killed between its two renames."""
    new, old = _beside(target)
    return new if not target.is_dir() and old.is_dir() and (new / LAST_FILE).is_file() else target


def sweep_folder(target: Path, *, resume: bool = False) -> None:
    """Finish a killed swap of `target` and remove what killed builds left beside it, except, to `resume`, one with
    a journal.

    Only for the process that holds the lock.
    """
    new, old = _beside(target)
    if whole_folder(target) == new:
        new.rename(target)
        fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    if not resume or not (new / JOURNAL).is_file():
        shutil.rmtree(new, ignore_errors=True)
    (target / JOURNAL).unlink(missing_ok=True)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
