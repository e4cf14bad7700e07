"""`niels-gpt doctor` as it is run: what is wrong is named, with one command; the exit code says if training works."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.doctor import cli, selftest, trying
from niels_gpt.doctor.trying import Outcome
from niels_gpt.native import build
from niels_gpt.settings import resolve_settings

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, and a self-test that was done (it has a test of its own)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(cli, "try_it", lambda device: Outcome("ok", "done", {"all": 1.0}))
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(list(arguments))
    return code, capsys.readouterr().out


def commands(said: str) -> list[str]:
    return re.findall(r"^(?:needed|to improve), (.+?): .+$", said, flags=re.MULTILINE)


def test_a_machine_that_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, "--device", "cpu")  # on MPS, nothing is said of Triton
    assert code == 0 and "Training will work here." in said
    names = ("device", "dtype", "memory", "cores", "C++ compiler", "torch.compile", "workers", "disk", "write access")
    for name in (*names, "data", "tokenizer", "self-test"):
        assert re.search(rf"^. {re.escape(name)}", said, flags=re.MULTILINE), name
    assert "Triton is" in said and "chitchat" in said and "primer" in said
    assert len(said.splitlines()) <= 40


def test_a_narrow_terminal_cuts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, said = doctor(capsys, "--device", "cpu")
    assert "…" not in said and "reproducibility" in said


def test_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, "--json", "--device", "cpu")
    record = json.loads(said)
    assert code == 0 and record["works"] is True and record["device"] == "cpu"
    assert record["machine"]["cores"] >= 1 and record["self_test"]["status"] == "ok"
    by_name = {check["name"]: check for check in record["checks"]}
    assert set(by_name["dtype"]) == {"name", "status", "value", "reason", "fallback", "command"}


def test_a_broken_compiler(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = here / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'cannot compile today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    build.load.cache_clear()
    try:
        code, said = doctor(capsys)
    finally:
        build.load.cache_clear()
    assert code == 0 and "cannot compile today" in " ".join(said.split())
    assert commands(said) == ["C++ compiler"] and "unset CXX" in said


def test_no_write_access(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "full").write_text("a file, so that nobody, not even root, can make folders in it")
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", here / "full" / "checkpoints")
    code, said = doctor(capsys)
    assert code == 1 and "Training will not work here" in said
    assert commands(said) == ["write access"] and "needed, write access: cd ~" in said
    assert str(here / "full" / "checkpoints") in "".join(said.split())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_where_nobody_can_write(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    code, said = doctor(capsys)
    assert code == 1 and "write access" in commands(said)


def test_100_megabytes_of_disk(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 9 * 10**8, 10**8))
    code, said = doctor(capsys)
    assert code == 1 and "100 MB free" in " ".join(said.split()) and commands(said) == ["disk"]


def test_a_self_test_that_fails(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "try_it", lambda device: Outcome("problem", "illegal instruction (signal 4)"))
    code, said = doctor(capsys)
    assert code == 1 and "illegal instruction" in said and commands(said) == ["self-test"]
    monkeypatch.setattr(cli, "try_it", lambda device: Outcome("note", "slow"))
    assert doctor(capsys)[0] == 0


def test_a_config_that_needs_more(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = paths.PROJECT_ROOT / "configs" / "pretrain.json"
    code, said = doctor(capsys, "--config", str(config), "--no-self-test")
    assert code == 1 and {"data", "tokenizer"} <= set(commands(said))


@pytest.mark.parametrize("arguments", [["--config", "none.json"], ["--device", "tpu"], ["--device", "mps"]])
def test_wrong_usage(here: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_the_self_test_trains_saves_loads_and_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trying, "SECONDS", 200.0)
    outcome = trying.try_it("cpu")
    assert outcome.status == "ok", outcome.message
    assert set(outcome.seconds) == {"train and save", "load", "decode", "all"} and "30 steps" in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "error"),
    [("load_model", ValueError("damaged")), ("generate_ids", RuntimeError("no kernel image"))],
)
def test_a_part_that_fails_ends_the_self_test(
    part: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, part, fail)
    with pytest.raises(type(error), match=str(error)):
        selftest.run("cpu")


def test_a_process_that_dies_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "false")
    assert trying.try_it("cpu") == Outcome("problem", "it said nothing (exit code 1)")


@pytest.mark.parametrize(("steps", "status"), [(0, "problem"), (7, "note")])
def test_time_that_is_up(steps: int, status: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    lines = [json.dumps({"phase": "pretrain", "kind": "step", "step": n}) + "\n" for n in range(steps)]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert trying._unfinished(tmp_path).status == status


def test_its_config_is_small() -> None:
    resolved = resolve_settings("pretrain", paths.shipped(selftest.CONFIG))
    assert resolved.training.total_steps <= 30 and resolved.settings.tokenizer.type == "byte"
