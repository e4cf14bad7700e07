"""`runs/<id>/metrics.jsonl`: one JSON object per line, handed to the operating system at once.

Kinds: `step` (loss, rate, MFU ...), `eval` (losses, bits per byte, sample), `time` (seconds of each activity so far).
A killed process loses nothing that was recorded; a full disk loses nothing either, the lines wait for space.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from niels_gpt.files import whole_json_lines, write_text


class MetricsFile:
    """Appends to one file; `warn` hears once when that fails, and training goes on."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self._warn = path, warn
        self._handle: int | None = None
        self._size = 0  # of what is known to be whole
        self._waiting: list[str] = []
        self._failed = False

    def reopen(self, phase: str, step: int) -> list[dict[str, Any]]:
        """Open, without what will be done again: entries of the phase after `step`. Returns the phase's rest."""

        def stays(entry: Mapping[str, Any]) -> bool:
            return entry["phase"] != phase or bool(entry["step"] <= step)

        self.close()
        kept = [entry for entry in read_metrics(self.path) if stays(entry)]
        self._waiting = [line for line in self._waiting if stays(json.loads(line))]
        _keep_only(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = os.fstat(self._handle).st_size
        return [entry for entry in (*kept, *map(json.loads, self._waiting)) if entry["phase"] == phase]

    def record(self, entry: Mapping[str, Any]) -> None:
        """One line. Numbers that are not finite become null, so that every reader of JSON can read them."""
        try:
            line = _encode(entry)
        except ValueError:
            line = _encode(_finite(entry))
        self._waiting.append(line + "\n")
        self._append()

    def _append(self) -> None:
        if self._handle is None:
            return
        content = "".join(self._waiting).encode()
        try:
            if os.write(self._handle, content) < len(content):
                raise OSError("a line was cut")
        except OSError as error:
            os.ftruncate(self._handle, self._size)  # no half lines
            if not self._failed:
                self._warn(
                    f"{self.path} cannot be written: {error.strerror or error}; its lines wait, training goes on"
                )
            self._failed = True
            return
        self._size += len(content)
        self._waiting.clear()
        self._failed = False

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _keep_only(path: Path, content: str) -> None:
    """Make `content` all that a file holds; by cutting the file off where that is enough: a full disk allows that."""
    wanted = content.encode()
    if path.is_file() and path.read_bytes().startswith(wanted):
        os.truncate(path, len(wanted))
    else:
        write_text(path, content)


_encode = json.JSONEncoder(allow_nan=False).encode


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Entries of a metrics file, [] if there is none; what else is in it, such as half a line, is passed over."""
    return [entry for entry in whole_json_lines(path) if _is_entry(entry)]


def _is_entry(entry: Mapping[str, Any]) -> bool:
    types = {"phase": str, "kind": str, "step": int}
    return all(isinstance(entry.get(name), kind) for name, kind in types.items())
