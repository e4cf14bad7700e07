"""Reading, hashing and replacing files so that a crash leaves the old content or the new, never half.

Recipe: temporary file in the same folder, write, flush, fsync, rename, fsync the folder. Temporaries carry their
writer's pid, so a later start can sweep what a killed process left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")


def sha256_bytes(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """A fresh temporary name in the folder of `path`, recognisable by `sweep_temporaries`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path` durably, on any exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with open(temporary, "rb+" if os.name == "nt" else "rb") as file:  # a link to a read-only file can be synced
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a failed fsync does not say of what
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield a binary file whose content replaces `path` when the block ends without an exception."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file at `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` in UTF-8, line breaks as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Sorted keys, indent 2, final newline; NaN and infinities are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; ValueError names the file, the line and what is wrong (duplicate keys included)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_json_lines(path: str | Path) -> list[Any]:
    """Parse a file of one JSON value a line; ValueError names the file and the line."""
    values = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
    return values


def whole_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, [] if there is none; a line that a power cut left half-written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def publish_copy(source: Path, target: Path) -> None:
    """Make `target` an atomic copy of `source`: a hard link where the filesystem can, else bytes."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def sweep_temporaries(folder: Path) -> list[Path]:
    """Remove temporaries in `folder` whose writers are gone; returns what was removed."""
    removed = []
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match["pid"]) == os.getpid() or not psutil.pid_exists(int(match["pid"]))):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def is_disk_full(error: BaseException) -> bool:
    """True for ENOSPC/EDQUOT, and for the RuntimeError torch.save raises instead of them."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "write failed" in str(error))


def explained(error: Exception) -> str:
    """What a program tells a person about an error: no errno, but the file; a full disk is called that."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"the disk is full: {text}" if is_disk_full(error) and "disk is full" not in text else text


def is_closed_output(error: OSError) -> bool:
    """Whether writing failed because nobody reads any more: the other end of the pipe, or the terminal, has gone."""
    return error.errno in (errno.EPIPE, errno.EIO)


def discard_output(stream: IO[str] | None = None) -> None:
    """After a BrokenPipeError: let what is still written to stdout (or `stream`) go nowhere.

    Whoever read it has gone, and Python would complain of the unwritten rest.
    """
    with contextlib.suppress(OSError, ValueError):
        target = (stream or sys.stdout).fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)
