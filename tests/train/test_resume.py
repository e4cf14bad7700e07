"""Kill it or signal it at any instant: the resumed run has the same losses and the same weights, to the bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.run import main
from tests.train import workshop

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes that run PyTorch")


def pipeline(folder: Path, tokenizer: SentencePieceTokenizer, steps: int) -> Path:
    """Caches, config.json for both phases and pipeline.json, with dropout, accumulation and Muon."""
    workshop.build_caches(folder, tokenizer)
    config = workshop.overrides(folder, tokenizer, steps=steps, eval_every=13, ckpt_every=7)
    (folder / "config.json").write_text(json.dumps(config))
    names = dict.fromkeys(("pretrain_config_path", "sft_config_path"), str(folder / "config.json"))
    (folder / "pipeline.json").write_text(json.dumps(names))
    return folder


def disturbing(*arguments: str | int | Path) -> dict[str, Any]:
    """What `tests.train.disturbing` finds."""
    environment = {**workshop.environment(), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.disturbing", *map(str, arguments)]
    done = subprocess.run(command, cwd=workshop.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(found)
    return found


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Ten kills and a few signals, in one process: starting it takes longer than most of them."""
    folder = pipeline(tmp_path_factory.mktemp("disturbed"), tiny_tokenizer, 20)
    return disturbing(folder, "--kills", 10, "--seed", 3, "--signals", "few")


def check(tally: dict[str, Any], kills: int) -> None:
    assert tally["kills"] == kills
    for fault in ("lost", "unloadable", "different", "failed"):
        assert tally[fault] == 0, tally
    assert tally["most_in_a_run"] >= 3  # one resume after the other


@linux_only
def test_kills_at_random_instants(disturbed: dict[str, Any]) -> None:
    check(disturbed["kills"], 10)


@linux_only
@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kills", "compiled"), [(300, False), (20, True)], ids=["plain", "compiled"])
def test_hundreds_of_kills(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, kills: int, compiled: bool) -> None:
    """Wherever a run may be: opening data, in a step, compiling, evaluating, saving."""
    options = ("--kills", kills, "--seed", 20261126, *(["--compile"] if compiled else []))
    tally = disturbing(pipeline(tmp_path, tiny_tokenizer, 40), *options)["kills"]
    check(tally, kills)
    assert compiled or min(tally["where"][place] for place in ("start", "step", "evaluation", "save")) > 0


def test_a_process_that_is_killed_from_outside(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself, killed and started again, beside a run that nothing disturbs."""
    rng = random.Random(7)
    pretrain = ("--phase", "pretrain", "--config", "config.json", "--device", "cpu")
    straight = pipeline(tmp_path / "straight", tiny_tokenizer, 30)
    monkeypatch.chdir(straight)
    assert main([*pretrain]) == 0
    folder = pipeline(tmp_path / "killed", tiny_tokenizer, 30)
    workshop.kill_at(folder, "pretrain", rng.randint(8, 24), rng, *pretrain)
    assert "resumed from" in workshop.run(folder, *pretrain).stdout
    assert workshop.steps_logged(folder) == workshop.steps_logged(straight)
    latest = "checkpoints/pretrain/latest.pt"
    assert workshop.weights_sha(folder / latest) == workshop.weights_sha(straight / latest)


@linux_only
@pytest.mark.parametrize(
    "amount", ["few", pytest.param("all", marks=[pytest.mark.soak, pytest.mark.timeout(1200)])], ids=str
)
def test_signals(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, request: pytest.FixtureRequest, amount: str
) -> None:
    """The first saves and leaves with 128+n, wherever it comes; the second leaves at once, with all files whole."""
    if amount == "few":
        found = request.getfixturevalue("disturbed")["signals"]
    else:
        found = disturbing(pipeline(tmp_path, tiny_tokenizer, 40), "--signals", "all")["signals"]
    saved = {name: scene["saved"] for name, scene in found.items() if "saved" in scene}
    expected = {"data 1": 0, "evaluation 1": 13, "step 1": 1, "step 9": 9, "evaluation 7": 40, "save 3": 13}
    assert saved == ({name: expected[name] for name in ("data 1", "evaluation 1")} if amount == "few" else expected)
    for name, scene in found.items():
        assert scene["same"], name
        if name.startswith("twice"):
            assert scene["exit"] == 143 and scene["sound"] and "native code ended" not in scene["said"], (name, scene)
        else:
            assert scene["exit"] == 128 + scene["signal"], (name, scene)
            assert f"stopped by signal {scene['signal']}" in scene["said"], (name, scene)
