"""Building a folder beside the one that it replaces, so that a kill leaves the old folder or the new one, never a mix.

A folder cannot be renamed onto a folder that has files in it, so a swap takes two renames:

1. build `.NAME.new` beside the target and make it durable; its last file is `LAST_FILE`;
2. rename the target to `.NAME.old`, then `.NAME.new` to the target;
3. delete `.NAME.old`.

If the target is missing while `.NAME.old` and a finished `.NAME.new` are there, `.NAME.new` is the folder to read, and
the next build finishes the swap. One process builds at a time: `.NAME.lock` is held meanwhile, and says who holds it.

A target that is a symbolic link stays one: all of this happens where it leads to.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
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
    place = _place(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}.lock")
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _check_can_hold_files(path)
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


def _check_can_hold_files(lock: Path) -> None:
    """OSError if no file can be made beside a lock that is not there: the lock's library would try again for ever."""
    if lock.exists():
        return
    try:
        with tempfile.TemporaryFile(dir=lock.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, "no files can be made in this folder", str(lock.parent)) from None


@contextmanager
def replacing_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` when the block ends well; otherwise it is removed.

    With `resume`, a folder that holds a `JOURNAL` is kept when the block is interrupted, and yielded again the next
    time; in the end the journal is removed. The caller makes the files durable, this the folders and renames.
    """
    with locked(target):
        sweep_folder(target, resume=resume)
        place = _place(target)
        new, old = _beside(place)
        new.mkdir(exist_ok=True)
        try:
            yield new
            for folder, _, _ in os.walk(new):
                fsync_folder(Path(folder))
            if place.is_dir():
                place.rename(old)
            try:
                new.rename(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
            fsync_folder(place.parent)
            sweep_folder(target)
        except BaseException as error:
            if not resume or isinstance(error, ValueError) or not (new / JOURNAL).is_file():
                shutil.rmtree(new, ignore_errors=True)
            raise


def whole_folder(target: Path) -> Path:
    """Where the content of `target` is: itself, or the new folder of a swap that was killed between its two renames."""
    new, old = _beside(_place(target))
    return new if not target.is_dir() and old.is_dir() and (new / LAST_FILE).is_file() else target


def sweep_folder(target: Path, *, resume: bool = False) -> None:
    """Finish a killed swap of `target` and remove what killed builds left beside it, except, to `resume`, one with
    a journal.

    Only for the process that holds the lock.
    """
    place = _place(target)
    new, old = _beside(place)
    if whole_folder(place) == new:
        new.rename(place)
        fsync_folder(place.parent)
    _remove(old)
    if not resume or not (new / JOURNAL).is_file():
        _remove(new)
    (place / JOURNAL).unlink(missing_ok=True)
    if (left := _beside(target.absolute())[1]).is_symlink():  # an earlier version moved the target itself, a link
        left.unlink()


def _place(target: Path) -> Path:
    """Where the target's files are: a link on the way, or the target itself, may lead to another disk."""
    return Path(os.path.realpath(target))


def _beside(place: Path) -> tuple[Path, Path]:
    return place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")


def _remove(path: Path) -> None:
    if path.is_symlink():  # rmtree refuses links, and what one leads to is not ours
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
