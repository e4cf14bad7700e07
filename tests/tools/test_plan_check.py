"""Comparing a plan with what came of it: what must hold, and going on where a long comparison was broken off."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import files
from niels_gpt.plan.running import KEPT
from tools import plan_check


def candidate(name: str, bpb: float, speed: float, peak_bytes: int = 10**9) -> dict[str, Any]:
    prediction = {"low": 0.98 * bpb, "bpb": bpb, "high": 1.02 * bpb}
    sizes = {"total_seconds": 180.0, "peak_bytes": peak_bytes, "disk_bytes": 10**8, "tokens": 10**6}
    return {"name": name, "prediction": prediction, "tokens_per_s": speed, "settings": {"of": name}, **sizes}


SHOWN = [candidate("middle", 1.70, 9000.0), candidate("small", 1.75, 20000.0), candidate("large", 1.80, 4000.0)]
PLAN = {"hours": 0.05, "chosen": SHOWN[0], "candidates": [*SHOWN, candidate("hidden", 2.0, 1.0)]}


def actual(bpb: float, **other: float) -> dict[str, Any]:
    return {"seconds": 181.0, "peak_bytes": 1.1e9, "disk_bytes": 1.02e8, "tokens": 10**6, "bpb": bpb, **other}


class Machine:
    """Stands in for planning and training: what each candidate reaches, and whose training breaks off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = {"middle": 1.69, "small": 1.76, "large": 1.80}
        self.breaks: set[str] = set()
        self.trained: list[str] = []
        self.plans = 0
        monkeypatch.setattr(plan_check, "make_plan", self.make_plan)
        monkeypatch.setattr(plan_check, "carry_out", self.carry_out)

    def make_plan(self, args: Any, folder: Path) -> dict[str, Any]:
        self.plans += 1
        plan = {**PLAN, "settings": {"plan": {"shown": 3}}}
        files.write_json(folder / KEPT, plan)
        return plan

    def carry_out(self, folder: Path, device: str | None) -> dict[str, Any]:
        record = files.read_json(folder / KEPT)
        name = record["chosen"]["name"]
        if "of" in record["settings"]:
            assert record["settings"] == {"of": name} == {"of": folder.name}
        self.trained.append(name)
        if name in self.breaks:
            raise subprocess.CalledProcessError(1, ["python", "-m", "train", name])
        return actual(self.reached[name])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        ({}, None),
        ({"seconds": 199.0}, "seconds within 10%"),
        ({"peak_bytes": 1.16e9}, "peak within 15%"),
        ({"disk_bytes": 0.94e8}, "disk within 5%"),
        ({"bpb": 1.735}, "bits per byte inside the band"),
    ],
)
def test_what_must_hold(found: dict[str, float], missed: str | None) -> None:
    held = plan_check.verdicts(PLAN, {**actual(1.70), **found})
    assert [name for name, holds in held.items() if not holds] == ([missed] if missed else [])


def test_the_band_must_be_narrow_from_half_an_hour_on() -> None:
    wide = {**SHOWN[0], "prediction": {"low": 1.6, "bpb": 1.7, "high": 1.8}}
    assert all(plan_check.verdicts({"hours": 0.49, "chosen": wide}, actual(1.70)).values())
    assert not all(plan_check.verdicts({"hours": 0.5, "chosen": wide}, actual(1.70)).values())


def test_one_plan(machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_check.main(["--hours", "0.05", "--out", str(tmp_path / "a"), "--memory-gb", "4"]) == 0
    assert "yes memory below 4 GB" in capsys.readouterr().out
    assert plan_check.main(["--hours", "0.05", "--out", str(tmp_path / "b"), "--memory-gb", "1.05"]) == 1
    assert "NO  memory below 1.05 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reached", "status"),
    [
        ({}, 0),
        ({"large": 1.68}, 0),  # within 1 % of the best
        ({"large": 1.66}, 1),
        ({"small": 1.685}, 1),  # the fastest is better
    ],
)
def test_all_candidates(machine: Machine, tmp_path: Path, reached: dict[str, float], status: int) -> None:
    machine.reached |= reached
    assert plan_check.main(["--all-candidates", "--hours", "0.05", "--out", str(tmp_path)]) == status
    assert machine.trained == ["middle", "small", "large"]


@pytest.mark.parametrize("broken", ["middle", "small"])
def test_goes_on_where_it_was_broken_off(
    machine: Machine, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--all-candidates", "--hours", "0.05", "--out", str(tmp_path)]
    machine.breaks = {broken}
    assert plan_check.main(command) == 1 and "ended with exit code 1" in capsys.readouterr().err
    (tmp_path / broken / "half").write_text("of the broken run")
    machine.breaks = set()
    assert plan_check.main(command) == 0 and machine.plans == 1
    assert sorted(machine.trained) == sorted(["middle", "small", "large", broken])
    assert not (tmp_path / broken / "half").exists()
    for other in (command[1:], ["--all-candidates", "--hours", "0.1", *command[3:]]):
        with pytest.raises(SystemExit):
            plan_check.main(other)  # not the comparison that began here
