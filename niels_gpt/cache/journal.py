"""The journal of a build: what of it is durable, so that the next build goes on from there.

Written whole after the files that it vouches for were synced. It names every finished file with its hash, and every
unfinished one with the bytes that count; whatever else is in the folder came later and is removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from niels_gpt.cache.folder import JOURNAL
from niels_gpt.files import fsync_folder, read_json, sha256_file, write_json


def write_journal(folder: Path, key: str, state: Mapping[str, Any]) -> None:
    """Record the state of the build `key`; its files must be synced."""
    for parent, _, _ in os.walk(folder):
        fsync_folder(Path(parent))
    write_json(folder / JOURNAL, {"key": key, **state})


def read_journal(folder: Path, key: str) -> dict[str, Any] | None:
    """The last state of the build `key`, with the folder as it was then; None if there is none or files are damaged."""
    try:
        state = read_json(folder / JOURNAL)
        if state["key"] != key or not _sound(folder, state):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != JOURNAL and name not in state["files"] and name not in state["open"]:
            path.unlink()
    found: dict[str, Any] = state
    return found


def _sound(folder: Path, state: Mapping[str, Any]) -> bool:
    long_enough = all((folder / name).stat().st_size >= size for name, size in state["open"].items())
    return long_enough and all(
        (folder / name).stat().st_size == entry["size"] and sha256_file(folder / name) == entry["sha256"]
        for name, entry in state["files"].items()
    )


def clear(folder: Path) -> None:
    """Remove everything in the folder, the journal first."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
