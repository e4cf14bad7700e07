"""A sweep: what is on disk is not measured again, a broken trial is a row, and the summary says what was found."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from niels_gpt.bench import summary, sweep
from niels_gpt.bench.trial import Result, Trial
from niels_gpt.command import Interrupted
from niels_gpt.files import whole_json_lines

GRID = [
    {"T": 32, "C": 32, "L": 1, "H": 2, "d_ff": 64, "amp": False},
    {"T": 64, "C": 64, "L": 2, "H": 2, "d_ff": 128, "amp": False},
]
PARAMETERS = {1: 522_368, 2: 1_100_000}  # by blocks
FITS = 5  # rows of a microbatch, in this made-up machine


class Machine:
    """Runs trials by a formula; notes what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []  # T, rows
        self.before: Callable[[Trial], Result | None] = lambda trial: None
        monkeypatch.setattr(sweep, "run_trial", self.run_trial)

    def run_trial(self, trial: Trial, timeout_s: float) -> Result:
        special = self.before(trial)
        self.asked.append((trial.model.T, trial.micro_B))
        if special is not None:
            return special
        if trial.micro_B > FITS:
            return Result(trial, "oom", message="out of memory")
        rate = 1000.0 * trial.micro_B / trial.model.L
        ms, memory = 1000 * trial.micro_B * trial.model.T / rate, 10**6 * trial.micro_B
        return Result(trial, "ok", ms, rate, memory, PARAMETERS[trial.model.L])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.chdir(tmp_path)
    Path("grid.json").write_text(json.dumps(GRID))
    return Machine(monkeypatch)


def bench(*more: str) -> int:
    return sweep.main(["--device", "cpu", "--grid", "grid.json", "--max_micro_B", "16", "--out_dir", "out", *more])


def sizes(T: int) -> list[int]:
    return [row["micro_B"] for row in whole_json_lines(Path("out/results.jsonl")) if row["model"]["T"] == T]


def test_every_size_is_measured_once_and_all_trials_are_rows(machine: Machine) -> None:
    assert bench() == 0
    assert sizes(32) == sizes(64) == [1, 2, 4, 8, 6, 5]
    rows = whole_json_lines(Path("out/results.jsonl"))
    assert {row["status"] for row in rows} == {"ok", "oom"}
    assert all(row["memory"] == {} for row in rows if row["status"] == "ok")


@pytest.mark.parametrize("killed_at", [1, 3, 6, 7, 11])
def test_a_sweep_that_was_stopped_goes_on(machine: Machine, killed_at: int) -> None:
    def stop(trial: Trial) -> None:
        if len(machine.asked) == killed_at:
            raise Interrupted("stopped", 128 + signal.SIGTERM)

    machine.before = stop
    assert bench() == 128 + signal.SIGTERM
    assert len(machine.asked) == killed_at == len(whole_json_lines(Path("out/results.jsonl")))
    machine.before = lambda trial: None
    assert bench() == 0
    assert len(machine.asked) == len(set(machine.asked)) == 12
    asked = list(machine.asked)
    assert bench() == 0 and machine.asked == asked  # nothing is left to do
    assert bench("--fresh") == 0 and machine.asked == asked + asked


def test_a_half_written_line_is_measured_again(machine: Machine) -> None:
    assert bench() == 0
    path = Path("out/results.jsonl")
    path.write_text(path.read_text()[:-30])
    before = len(machine.asked)
    assert bench() == 0
    assert machine.asked[before:] == [(64, 5)] and sizes(64) == [1, 2, 4, 8, 6, 5]


def test_another_setting_is_another_trial(machine: Machine) -> None:
    assert bench() == 0 and bench("--steps_measure", "3") == 0
    assert len(machine.asked) == 24


def test_a_broken_trial_is_a_row_with_its_configuration_and_the_rest_goes_on(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(trial: Trial) -> Result | None:
        return Result(trial, "error", message="it broke", stdout="a", stderr="b") if trial.model.T == 32 else None

    machine.before = broken
    assert bench() == 0
    row = whole_json_lines(Path("out/results.jsonl"))[0]
    assert (row["status"], row["message"], row["stdout"], row["stderr"]) == ("error", "it broke", "a", "b")
    assert row["model"]["T"] == 32 and row["micro_B"] == 1 and row["amp"] is False and row["device"] == "cpu"
    assert sizes(32) == [1] and len(sizes(64)) == 6
    table = Path("out/summary.md").read_text()
    assert "- T32 C32 L1: failed: it broke" in table and "| 1 ⭐ | 16000 | 64 |" in table
    machine.before = lambda trial: None
    assert bench() == 0 and sizes(32)[:2] == [1, 1]  # what was broken is tried again


def test_no_configuration_that_works_is_a_failure(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.before = lambda trial: Result(trial, "oom")
    assert bench() == 1
    assert "no configuration works here" in capsys.readouterr().err
    assert "out of memory with one row" in Path("out/summary.md").read_text()


def test_a_timeout_is_tried_again_with_more_time_only(machine: Machine) -> None:
    machine.before = lambda trial: Result(trial, "timeout") if trial.micro_B > 2 else None
    assert bench() == 0
    before = len(machine.asked)
    assert bench() == 0 and len(machine.asked) == before
    assert bench("--timeout_s", "60") == 0 and len(machine.asked) > before


def test_no_figure_of_the_table_is_cut_in_a_pipe(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    printed = capsys.readouterr().out
    assert summary.QUALITY in printed and "configuration" in printed and "…" not in printed


def test_the_summary_ranks_by_tokens_of_a_night(machine: Machine) -> None:
    assert bench() == 0
    lines = Path("out/summary.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("| 1 ⭐"))
    second = next(line for line in lines if line.startswith("| 2 |"))
    assert "| 32 | 32 | 1 | 2 | 64 | False | False | 5 |" in first and "| 5000 | 1.44e+08 | 522368 |" in first
    assert "| 64 | 64 | 2 |" in second and "| 2500 | 7.20e+07 | 1100000 |" in second
    bits = [re.fullmatch(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", line.split("|")[-2].strip()) for line in (first, second)]
    expected, low, high = zip(*(map(float, found.groups()) for found in bits if found), strict=True)
    assert all(a <= b <= c for a, b, c in zip(low, expected, high, strict=True))
    assert expected[1] < expected[0]  # the faster one is too small to become as good, so the other is advised
    assert "## Train T64 C64 L2 overnight" in lines
    text = "\n".join(lines)
    assert "fits up to 5 rows; out of memory with 6" in text
    assert '"micro_B": 5' in text and "steps_8h" in text


def test_the_fastest_size_counts_also_where_more_rows_fit(machine: Machine) -> None:
    speeds = {1: 10.0, 2: 30.0, 4: 25.0, 5: 20.0}

    def before(trial: Trial) -> Result | None:
        if trial.micro_B > FITS:
            return None
        return Result(trial, "ok", 1.0, speeds[trial.micro_B], 1, PARAMETERS[trial.model.L])

    machine.before = before
    assert bench() == 0 and max(sizes(32)) > FITS
    assert "| 32 | 32 | 1 | 2 | 64 | False | False | 2 |" in Path("out/summary.md").read_text()


def test_devices_of_one_machine_are_not_ranked_together(machine: Machine) -> None:
    """A Mac describes itself alike for both of its devices."""
    assert bench() == 0
    path, alone = Path("out/results.jsonl"), Path("out/summary.md").read_text()
    rows = [{**row, "device": "mps", "key": f"{row['key']}m"} for row in whole_json_lines(path)]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    assert bench() == 0 and Path("out/summary.md").read_text() == alone


def test_two_sweeps_do_not_share_a_folder(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with FileLock("out/.lock"):
        assert bench() == 1
    assert "another sweep" in capsys.readouterr().err and not machine.asked


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_micro_B", "0"], "benchmark.max_micro_B: must be at least 1"),
        (["--timeout_s", "-1"], "benchmark.timeout_s: must be greater than 0"),
        (["--grid", "none.json"], "No such file"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_wrong_usage_is_a_sentence(
    machine: Machine, flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        bench(*flags)
    assert stop.value.code == 2 and not machine.asked
    assert said in capsys.readouterr().err
