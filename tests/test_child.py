"""Children: how they end is told, and they take along all that they started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from niels_gpt import child
from niels_gpt.child import Ended, run_module


def test_what_a_child_has_started_ends_with_it() -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '300']); print('on', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        (helper,) = psutil.Process(process.pid).children()
        child.end_family(process.pid)
    assert process.returncode == -9
    assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that the child finds, to be written."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib" / "a_child.py"


def test_it_runs_in_its_folder_and_finds_this_project(module: Path, tmp_path: Path) -> None:
    module.write_text("import os, sys, niels_gpt\nprint(os.getcwd(), *sys.argv[1:])\nsys.exit(3)\n")
    ended = run_module("a_child", "a", "b c", timeout_s=60, folder=str(tmp_path))
    assert (ended.code, ended.stdout, ended.how) == (3, f"{tmp_path} a b c\n", "exit code 3")
    assert Ended(-9, "", "", 1.0).how == "signal 9"


def test_time_that_is_up_ends_it(module: Path) -> None:
    module.write_text("import time\ntime.sleep(300)\n")
    ended = run_module("a_child", timeout_s=0.3)
    assert (ended.code, ended.how) == (None, "time was up") and 0.3 <= ended.seconds < 60
