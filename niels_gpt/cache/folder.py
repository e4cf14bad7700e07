"""Replacing a whole folder so that a kill leaves the old folder or the new one, never a mix.

A folder cannot be renamed onto a folder that has files in it, so a swap takes two renames:

1. build `.NAME.PID.TAG.new` beside the target and make it durable;
2. rename the target to `.NAME.PID.TAG.old`, then rename `.new` to the target;
3. delete `.old`.

An `.old` exists only after its `.new` is whole. So if the target is missing and both are there, `.new` is the folder to
read, and the next build finishes the swap. Everything else that a killed process left behind is rubbish.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from niels_gpt.files import fsync_folder

_SWAP_ATTEMPTS = 10


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `target`, on any exception it is removed.

    The caller makes the files durable; this makes the folders and the renames so.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_folder(target)
    new = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.new")
    new.mkdir()
    try:
        yield new
        for folder, _, _ in os.walk(new):
            fsync_folder(Path(folder))
        _swap_in(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap_in(new: Path, target: Path) -> None:
    old = new.with_suffix(".old")
    for attempt in range(_SWAP_ATTEMPTS):
        if target.is_dir():
            target.rename(old)
        try:
            new.rename(target)
            break
        except OSError as error:
            if old.exists() and not target.exists():
                old.rename(target)
            another_won = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not another_won or attempt == _SWAP_ATTEMPTS - 1:
                raise
            shutil.rmtree(old, ignore_errors=True)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def whole_folder(target: Path) -> Path:
    """Where the content of `target` is: itself, or the new folder of a swap that was killed between its two renames."""
    if not target.is_dir():
        for new, old in _swaps(target):
            if new.is_dir() and old.is_dir():
                return new
    return target


def sweep_folder(target: Path) -> None:
    """Finish a killed swap of `target` and remove what dead processes left beside it."""
    for new, old in _swaps(target):
        pid = int(new.name.split(".")[-3])
        if pid != os.getpid() and psutil.pid_exists(pid):
            continue
        if not target.exists() and new.is_dir() and old.is_dir():
            new.rename(target)
            fsync_folder(target.parent)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swaps(target: Path) -> list[tuple[Path, Path]]:
    """The (new, old) paths of every swap of `target` that left a trace, either of which may be missing."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.(new|old)")
    if not target.parent.is_dir():
        return []
    stems = {path.with_suffix("") for path in target.parent.iterdir() if pattern.fullmatch(path.name)}
    return [(Path(f"{stem}.new"), Path(f"{stem}.old")) for stem in sorted(stems)]
