"""The self-test, tried in a process of its own: what crashes or hangs there is a result here."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from niels_gpt.child import run_module
from niels_gpt.doctor.checks import Status
from niels_gpt.train.metrics import read_metrics

PROGRAM = "niels_gpt.doctor.selftest"
SECONDS = 20.0  # longest self-test


@dataclass(frozen=True)
class Outcome:
    """How the self-test went. seconds: of each part."""

    status: Status
    message: str
    seconds: dict[str, float] = field(default_factory=dict)


def try_it(device: str) -> Outcome:
    """Run the self-test in a fresh process, in a folder of its own here (elsewhere, if nothing can be written here)."""
    try:
        with _folder() as folder:
            return _in_a_process(device, folder)
    except OSError as error:
        return Outcome("problem", f"it has no folder to work in: {error.strerror or error}")


def _folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=".niels-doctor-", dir=".", ignore_cleanup_errors=True)
    except OSError:
        return tempfile.TemporaryDirectory(prefix="niels-doctor-", ignore_cleanup_errors=True)


def _in_a_process(device: str, folder: str) -> Outcome:
    ended = run_module(PROGRAM, "--device", device, timeout_s=SECONDS, folder=folder)
    if ended.code is None:
        return _unfinished(Path(folder))
    lines = ended.stdout.strip().splitlines()
    if ended.code == 0 and lines:
        outcome = Outcome(**json.loads(lines[-1]))
        return replace(outcome, seconds={**outcome.seconds, "all": round(ended.seconds, 1)})
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Outcome("problem", f"{last[:300]} ({ended.how})")


def _unfinished(folder: Path) -> Outcome:
    """When time was up: a machine whose run has logged steps is slow, one without may hang."""
    steps = sum(entry["kind"] == "step" for path in folder.glob("runs/*/metrics.jsonl") for entry in read_metrics(path))
    if steps:
        return Outcome("note", f"it trains, but slowly: {steps} small steps within {SECONDS:g} s, its start included")
    return Outcome("problem", f"not one training step was done within {SECONDS:g} s")
