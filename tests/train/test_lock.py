"""Two trainings in one folder at once: the second is refused, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from niels_gpt import paths
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.run import main
from tests.train import workshop

HOLDER = """
import sys
from filelock import FileLock
with FileLock(".checkpoints.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""  # as another training, but started in no time


def test_a_second_training_is_refused_until_the_first_is_gone(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pretrain", "sft"):
        world["training"][name] |= {"total_steps": 1, "warmup_steps": 0}
    Path("c.json").write_text(json.dumps(world))
    Path("p.json").write_text(json.dumps({"pretrain_config_path": "c.json", "sft_config_path": "c.json"}))
    commands = [
        ["--phase", phase, "--config", config, "--device", "cpu"]
        for phase, config in (("pretrain", "c.json"), ("sft", "c.json"), ("pipeline", "p.json"))
    ]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=workshop.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        Path(".checkpoints.lock").write_text("process 7 on a machine")
        for command in commands:
            assert main(command) == 1
            assert capsys.readouterr().err == (
                "error: another training (process 7 on a machine) is writing to checkpoints/;"
                " wait for it or work in another folder\n"
            )
        assert not Path("checkpoints").exists() and not Path("runs").exists()
        holder.kill()
    assert Path(".checkpoints.lock").exists()  # of a killed process, and in nobody's way
    assert main(commands[-1]) == 0
    assert not Path(".checkpoints.lock").exists()


def test_phases_of_one_run_do_not_hinder_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter that the folder is moved away meanwhile, or that a child process is forked and ends."""
    monkeypatch.chdir(tmp_path)
    lock = FileLock(tmp_path / ".checkpoints.lock", timeout=0)
    with only_training_here():
        paths.CHECKPOINT_DIR.mkdir()
        with only_training_here():
            shutil.move("checkpoints", "checkpoints-old")
        assert f"process {os.getpid()} on " in Path(".checkpoints.lock").read_text()
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(TimeoutError):
            lock.acquire()
    lock.acquire()
    lock.release()
    with pytest.raises(KeyError), only_training_here():
        raise KeyError
    with only_training_here():
        pass


def refuse(*_: object) -> None:
    raise OSError(38, "Function not implemented")


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        reached = False
        with only_training_here(), only_training_here():
            reached = True
        assert reached
