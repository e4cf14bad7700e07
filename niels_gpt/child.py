"""A module of this project in a fresh Python: what crashes, hangs or is killed there is a result here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

from niels_gpt import paths

REAP_SECONDS = 10.0  # longest wait for what was killed


@dataclass(frozen=True)
class Ended:
    """How a child ended. code: its exit code, -n after signal n, None if its time was up; seconds: with its start."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def how(self) -> str:
        """Its end in words."""
        if self.code is None:
            return "time was up"
        return f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"


def run_module(module: str, *arguments: str, timeout_s: float, folder: str | None = None) -> Ended:
    """Run `python -m module` in `folder` (default: here); after `timeout_s` it is killed with all that it started.

    OSError if there is no such Python.
    """
    path = os.pathsep.join(filter(None, (str(paths.IMPORT_ROOT), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            end_family(process.pid)
            stdout, stderr = process.communicate()
            code = None
        except BaseException:
            end_family(process.pid)
            raise
    return Ended(code, stdout, stderr, time.monotonic() - began)


def end_family(pid: int) -> None:
    """Kill a process and all that it has started (the compiler's helpers, say)."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family[:-1], timeout=REAP_SECONDS)
