"""`results.jsonl`: every trial of a sweep, one JSON object a line, on disk before the next trial begins.

A sweep that is started again finds here what it need not measure again: a trial is known by all that it depends on,
the machine and the version of PyTorch included.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from niels_gpt.bench.trial import Result, Trial, result_of, row_of
from niels_gpt.files import sha256_bytes, whole_json_lines

KEY_LENGTH = 16


class Results:
    """The rows of a file, and those of this machine by trial."""

    def __init__(self, path: Path, machine: str) -> None:
        """machine: what a figure depends on besides its trial, in words."""
        self.path, self.machine = path, machine
        self.rows = [row for row in whole_json_lines(path) if "status" in row]

    def known(self, trial: Trial, timeout_s: float) -> Result | None:
        """What came of the same trial before, unless it may end otherwise now: after an error, or with more time."""
        key = key_of(trial, self.machine)
        for row in reversed(self.rows):
            if row.get("key") == key and (row["micro_B"] == trial.micro_B):
                lasting = row["status"] in ("ok", "oom")
                if lasting or (row["status"] == "timeout" and row.get("timeout_s", 0) >= timeout_s):
                    return result_of(trial, row)
        return None

    def add(self, result: Result, timeout_s: float) -> None:
        """Append a row, and wait until it is on disk. OSError if it cannot be written."""
        row = row_of(result) | {"timeout_s": timeout_s, "machine": self.machine}
        row["key"] = key_of(result.trial, self.machine)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell() and not _ends_with_newline(file):  # a line that a power cut left half-written
                file.write(b"\n")
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def here(self, device: str) -> list[dict[str, Any]]:
        """The rows of one device of this machine."""
        return [row for row in self.rows if (row.get("machine"), row.get("device")) == (self.machine, device)]


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def key_of(trial: Trial, machine: str) -> str:
    """The same for trials that differ in nothing but their rows."""
    values = {name: value for name, value in trial.as_dict().items() if name != "micro_B"}
    return sha256_bytes(json.dumps([values, machine], sort_keys=True).encode())[:KEY_LENGTH]
