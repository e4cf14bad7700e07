"""The quickstart itself, at a few seconds of training: everything it makes, says, reuses and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from niels_gpt import quickstart
from niels_gpt.cli import COMMANDS, main
from niels_gpt.quickstart import make_plan
from niels_gpt.summary import sample_of
from tests.train import workshop

SLACK_S = 60  # for a machine that is busy; the steps of the config would take ten minutes and more


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder it makes, and what it says, started as a user does."""
    pytest.importorskip("chitchat_dataset")
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, "-m", "niels_gpt.cli", "quickstart", "--minutes", "0.1", "--no-chat", "--out", "made"],
        cwd=folder,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return folder / "made", done.stdout


def test_it_makes_a_model_and_says_how_good_it_is(first: tuple[Path, str]) -> None:
    folder, out = first
    for step in ("1/5 tokenizer", "2/5 caches", "3/5 pretraining", "4/5 fine-tuning", "5/5 summary"):
        assert f"[{step}]" in out
    assert re.search(r"[\d,]{7,} parameters; [\d,]{4,} tokens in \d+ s of training \([\d,]+ tokens/s", out)
    bits = re.search(r"chitchat\D+(\d\.\d+)\D+(\d\.\d+)\D+(\d\.\d+)\D+8\.000", out)
    assert bits is not None and float(bits[1]) < float(bits[3]) < 8.0  # seconds of training beat letter frequencies
    assert re.search(r"primer recall, 100 of 1,\d{3} trained questions: \d+/100 \(", out)
    assert re.search(r"primer recall, held-out: \d+/60 \(", out)
    assert (
        "> what is your name?" in out
        and "niels-gpt chat --ckpt made/checkpoints/best.pt" in out
        and "logs: made/runs/" in out
    )
    for name in ("best.pt", "latest.pt", "pretrain/best.pt", "sft/best.pt"):
        assert (folder / "checkpoints" / name).is_file()
    assert (folder / "artifacts/tokenizer/quickstart/spm.model").is_file()


def test_the_budget_holds_evaluations_and_saves_too(first: tuple[Path, str]) -> None:
    """Whatever the machine, training stops when the time is up: at most one step and one save late."""
    _, out = first
    finished = re.findall(r"finished (\d+) steps in (\d+):(\d\d)", out)
    assert len(finished) == 2 and all(int(steps) > 0 for steps, _, _ in finished)
    spent = sum(60 * int(minutes) + int(seconds) for _, minutes, seconds in finished)
    assert spent <= 0.1 * 60 + SLACK_S


def test_the_model_answers_on_stdout_alone(
    first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(first[0])
    ask = ("--prompt", "what is your name?")
    assert main(["chat", "--ckpt", "checkpoints/best.pt", "--temperature", "0", *ask, *ask]) == 0
    said = capfd.readouterr().out
    half = len(said) // 2
    assert said[:half].strip() and said[:half] == said[half:]


def again(
    folder: Path, minutes: str, before: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> str:
    """What another run says up to one of its steps, where Ctrl-C is pressed."""

    def press(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, before, press)
    monkeypatch.chdir(folder)
    assert main(["quickstart", "--minutes", minutes, "--no-chat"]) == 130
    out, err = capfd.readouterr()
    assert "interrupted; run the same command again to go on" in err
    return out


def test_a_second_run_reuses_what_is_still_valid(
    first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = first
    before = (folder / "checkpoints/best.pt").read_bytes()
    out = again(folder, "0.1", "measure", monkeypatch, capfd)
    assert "reused artifacts/tokenizer/quickstart/spm.model" in out and "4 of 4 caches reused" in out
    assert out.count("resumed from") == 2 and "[sft] finished" in out
    assert (folder / "checkpoints/best.pt").read_bytes() == before
    assert not list(folder.glob("checkpoints-*"))


def test_other_settings_move_the_old_model_aside(
    first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = first
    old = (folder / "checkpoints/best.pt").read_bytes()
    config = folder / "checkpoints/sft/latest.pt.resolved_settings.json"
    assert json.loads(config.read_text())["settings"]["training"]["sft"]["minutes"] == pytest.approx(0.1 * 0.6)
    out = again(folder, "0.05", "run_sft", monkeypatch, capfd)
    (aside,) = folder.glob("checkpoints-*")
    assert f"moved to {aside.name}" in out and (aside / "best.pt").read_bytes() == old
    assert "resumed from" not in out and "[4/5 fine-tuning]" in out


def test_a_short_run_is_asked_an_even_sample() -> None:
    questions = {f"question {i}": [str(i)] for i in range(1000)}
    assert sample_of(questions, 1.0) == questions
    assert list(sample_of(questions, 0.01)) == [f"question {i}" for i in range(0, 1000, 10)]
    assert len(sample_of(questions, 0.3)) == 300
    few = {"a": ["b"], "c": ["d"]}
    assert sample_of(few, 0.01) == few


def test_the_seed_decides_the_split() -> None:
    one, two = make_plan(5, 1).settings, make_plan(5, 2).settings
    assert one.data.chitchat.split_seed == 1 and two.data.primer.seed == 2 and two.training.sft.seed == 2
    phases = one.training
    assert (phases.pretrain.minutes or 0) + (phases.sft.minutes or 0) == pytest.approx(5)


@pytest.mark.parametrize("arguments", [("--minutes", "0"), ("--minutes", "nan"), ("--seed", "-1"), ("--minuts", "1")])
def test_wrong_usage_exits_2(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["quickstart", *arguments])
    assert leave.value.code == 2


def test_the_command_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main(["quikstart"]) == 2
    assert "unknown command 'quikstart'" in capsys.readouterr().err
    for name in COMMANDS:
        with pytest.raises(SystemExit) as leave:
            main([name, "--help"])
        assert leave.value.code == 0
