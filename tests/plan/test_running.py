"""`niels-gpt train --plan`: a plan carried out in seconds, stopped and gone on with, and kept with its runs."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from niels_gpt.cli import main
from niels_gpt.plan import running
from niels_gpt.plan.candidates import Question, candidate_of
from niels_gpt.plan.law import Scale, shipped_law
from niels_gpt.plan.planning import Plan
from niels_gpt.plan.recipe import Shape
from niels_gpt.plan.running import KEPT, comparison
from niels_gpt.settings import validate_overrides
from niels_gpt.train.prepare import set_other_runs_aside
from niels_gpt.train.start import TimeLimit
from tests.plan.samples import TEXT, Source, costs, machine
from tests.plan.test_text import on_primer
from tests.train import workshop

SECONDS = {"start": 8.0, "tokenizer": 0.5, "caches": 1.5, "pretrain": 2.5, "sft": 2.5, "evaluation": 1.0}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan for a tiny model on the primer, with times that suit a test."""
    overrides = on_primer(Path("here"))
    settings = validate_overrides(overrides)
    text = replace(TEXT, pretrain=(Source("primer", 165_000, 4_100, 1300),), tokenizer_s=0.5, caches_s=1.5)
    question = Question(0.05, settings, overrides, text, machine(), shipped_law(), Scale(1.0, 0.0))
    chosen = candidate_of(question, costs(), Shape(32, 1, 1, 96))
    assert chosen is not None
    made = Plan(0.05, 42, question.machine, text, [chosen], costs().measured, 1.0, True).record()
    made["chosen"] |= {"seconds": SECONDS, "total_seconds": sum(SECONDS.values()), "evaluated_windows": 4}
    for phase in ("pretrain", "sft"):
        made["settings"]["training"][phase] |= {"log_every": 1, "eval_every": 100, "ckpt_every": 100}
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain


@pytest.fixture(scope="module")
def done(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("planned")
    (folder / "plan.json").write_text(json.dumps(record))
    return folder, carried_out(folder)


def carried_out(folder: Path) -> str:
    """What `niels-gpt train --plan plan.json` says in a folder, by a process that has just started."""
    said, began = io.StringIO(), time.time() - SECONDS["start"]
    started = SimpleNamespace(Process=lambda: SimpleNamespace(create_time=lambda: began))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(running, "psutil", started)
        patch.chdir(folder)
        assert main(["train", "--plan", "plan.json", "--device", "cpu"]) == 0
    return said.getvalue()


def test_it_makes_everything_and_compares(done: tuple[Path, str], record: dict[str, Any]) -> None:
    folder, out = done
    for line in ("[1/4 tokenizer]", "[2/4 caches]", "[3/4 training]", "[4/4 evaluation]", "planned and actual"):
        assert line in out
    for name in ("best.pt", "pretrain/best.pt", "sft/best.pt"):
        assert (folder / "checkpoints" / name).is_file()
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob(f"runs/*/{KEPT}"))]
    assert len(kept) == 2 and kept[0] == kept[1]  # with both phases
    actual = kept[0].pop("actual")
    assert kept[0] == record
    assert actual["steps"]["pretrain"] > 0 and actual["steps"]["sft"] > 0 and 0 < actual["bpb"] < 8
    rows = {phase: record["settings"]["training"][phase]["micro_B"] for phase in ("pretrain", "sft")}
    assert actual["tokens"] == 64 * sum(actual["steps"][phase] * rows[phase] for phase in rows)
    assert actual["peak_bytes"] > 1e8 and 1e5 < actual["disk_bytes"] < 1e8


def test_one_that_is_stopped_goes_on(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(record))
    command = [sys.executable, "-u", "-m", "niels_gpt.cli", "train", "--plan", "plan.json"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=workshop.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "[sft] step 1 " in line:  # there always is one
                process.send_signal(signal.SIGTERM)  # which a shell never has ignored
        assert process.wait() == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob(f"runs/*/{KEPT}"))) == 2  # the plan is with what there is of its runs
    out = carried_out(tmp_path)
    assert "reused here/tokenizer/spm.model" in out and "2 of 2 caches reused" in out and "moved to" not in out
    assert "resumed from" in out and "planned and actual" in out
    assert (tmp_path / "checkpoints/sft/best.pt").is_file()
    actual = json.loads(next(tmp_path.glob(f"runs/*/{KEPT}")).read_text())["actual"]
    assert set(actual["steps"]) == {"pretrain", "sft"} and actual["steps"]["pretrain"] > 0  # of the session before
    assert actual["seconds"] > sum(SECONDS[part] for part in ("start", "pretrain", "sft"))


def test_a_plan_for_another_device_says_so(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("plan.json").write_text(json.dumps({**record, "device": "cuda"}))
    assert main(["train", "--plan", "plan.json"]) == 1
    assert "plan.json was made for cuda, which is not here; plan again on this machine" in capsys.readouterr().err


def test_what_compiling_takes_is_not_trained_over(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits = [1000.0], []

    def passes(seconds: float, result: object = None) -> Callable[..., object]:
        def work(*arguments: object, **more: object) -> object:
            now[0] += seconds
            return result

        return work

    def run_pipeline(settings: object, *, limit: TimeLimit, **more: object) -> None:
        limits.append(limit.minutes)
        raise KeyboardInterrupt

    (tmp_path / "plan.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(running, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(create_time=lambda: 1000.0)))
    for name, work in {"make_tokenizer": passes(1), "make_caches": passes(2), "compile_kernels": passes(4)}.items():
        monkeypatch.setattr(running, name, work)
    monkeypatch.setattr(running, "run_pipeline", run_pipeline)
    with pytest.raises(KeyboardInterrupt):
        running.run_planned(Path("plan.json"), device="cpu")
    assert limits == [pytest.approx((sum(SECONDS.values()) - 7 - SECONDS["evaluation"]) / 60)]


def test_only_checkpoints_of_other_settings_are_moved_away(
    done: tuple[Path, str], record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done[0])
    said = Console(file=io.StringIO(), width=200)
    longer, other = (json.loads(json.dumps(record["settings"])) for _ in range(2))
    longer["training"]["sft"]["minutes"] = 7.0
    other["model"]["rope_theta"] = 5000.0
    set_other_runs_aside(validate_overrides(longer), said, any_budget=True)
    assert (done[0] / "checkpoints/best.pt").is_file()
    set_other_runs_aside(validate_overrides(other), said, any_budget=True)
    assert not (done[0] / "checkpoints").exists() and list(done[0].glob("checkpoints-*/best.pt"))


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--plan", "none.json"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no plan at none.json; make one with")


def test_the_comparison_says_what_is_outside(record: dict[str, Any]) -> None:
    chosen = {**record["chosen"], "peak_bytes": 1e9, "disk_bytes": 2e8, "tokens": 1e6, "total_seconds": 100.0}
    chosen["prediction"] = {"bpb": 2.0, "low": 1.9, "high": 2.1}
    actual = {"seconds": 103.0, "peak_bytes": 1.1e9, "disk_bytes": 2e8, "tokens": 900_000, "bpb": 2.2}
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(comparison(chosen, actual))
    table = console.export_text()
    for figure in ("+3.0%", "+10.0%", "+0.0%", "-10.0%", "OUTSIDE THE BAND"):
        assert figure in table
    console.print(comparison(chosen, {**actual, "bpb": 2.05}))
    assert "inside the band" in console.export_text()
