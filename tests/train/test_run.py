"""The program: its name, its profiles, times of day, and what it says when it is stopped."""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest

from niels_gpt.train import run as program
from niels_gpt.train.loop import Loop
from niels_gpt.train.run import main, moment


def test_it_has_the_name_that_was_typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: niels-gpt train [-h]")
    monkeypatch.setattr(sys, "argv", ["train/run.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("train.run", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("usage: python -m train.run [-h]")


def test_a_profile_is_a_config_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name, layers in (("mine", 3), ("smoke", 5)):
        (tmp_path / f"configs/{name}.json").write_text(json.dumps({"model": {"L": layers}}))
    (tmp_path / "other.json").write_text(json.dumps({"model": {"L": 7}}))

    def layers_with(*flags: str) -> int:
        capsys.readouterr()
        assert main(["--phase", "pretrain", "--print_config", *flags]) == 0
        found: int = json.loads(capsys.readouterr().out)["model"]["L"]
        return found

    assert main(["--list-profiles"]) == 0
    listed = capsys.readouterr().out.split()
    assert "mine" in listed and "pretrain_smoke" in listed and listed.count("smoke") == 1
    assert layers_with("--profile", "mine") == 3
    assert layers_with("--profile", "smoke") == 5  # the folder's own before the shipped one
    assert layers_with("--profile", "pretrain_smoke") == 2
    assert layers_with("--profile", "mine", "--config", "other.json") == 7
    assert main(["--phase", "pretrain", "--profile", "mien", "--print_config"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown profile 'mien'; profiles are ")


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not hasattr(time, "tzset"):
        pytest.skip("this system cannot change its time zone")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(("day", "hours"), [("2031-03-29", 18), ("2031-03-30", 19), ("2031-10-25", 20)])
def test_the_next_time_of_day_is_right_when_clocks_change(
    berlin: None, monkeypatch: pytest.MonkeyPatch, day: str, hours: int
) -> None:
    """From noon to the next seven o'clock."""

    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromisoformat(f"{day}T12:00")

    monkeypatch.setattr(program, "datetime", Noon)
    assert moment("07:00") - Noon.now().timestamp() == hours * 3600
    assert moment("13:00") - Noon.now().timestamp() == 3600


@pytest.mark.parametrize(
    ("flags", "how"),
    [([], ""), (["--no-resume"], ", without --no-resume,"), (["--resume", "a.pt"], ", without --resume,")],
)
def test_stopped_it_says_how_to_go_on(
    world: dict[str, Any],
    flags: list[str],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a flag that makes it begin elsewhere, the same command would not go on."""
    Path("c.json").write_text(json.dumps(world))
    common = ["--phase", "pretrain", "--config", "c.json", "--device", "cpu"]
    one_step = Loop._one_step

    def stopping(loop: Loop) -> None:
        one_step(loop)
        loop.stop.signum = 15

    monkeypatch.setattr(Loop, "_one_step", stopping)
    step = 1
    if "--resume" in flags:
        assert main(common) == 143
        Path("checkpoints/pretrain/latest.pt").rename("a.pt")
        step = 2
    capsys.readouterr()
    assert main([*common, *flags]) == 143
    saved = f"stopped by signal 15 after step {step}; saved to checkpoints/pretrain/latest.pt"
    assert capsys.readouterr().err.splitlines()[-1] == f"{saved}; run the same command again{how} to go on"
