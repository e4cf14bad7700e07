"""What a user can get wrong, end to end: one clear line, exit 1 or 2, and not a byte of what was there changed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import chat_cli, files
from niels_gpt.cache import cli as cache_cli
from niels_gpt.tokenizer import SentencePieceTokenizer, train_tokenizer
from niels_gpt.train import run as train_run
from niels_gpt.train.pretrain import run_pretrain
from tests.train.workshop import T, build_caches, overrides

Outcome = tuple[int, str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A folder as a user has it after a short run: caches, settings, a checkpoint, a primer and some notes."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(str(tiny_tokenizer.model_path), folder / "spm.model")
    build_caches(folder, tiny_tokenizer)
    config = overrides(folder, tiny_tokenizer, steps=4)
    config["tokenizer"]["model_path"] = "spm.model"
    config["data"]["caches"] = {
        "pretrain_token_cache": "cache/pretrain",
        "sft_token_cache": "cache/sft",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "primer.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in [("hello there", "hi."), ("what are you?", "a small model."), ("bye", "so long.")] * 4
        )
    )
    (folder / "notes").mkdir()
    (folder / "notes/a.md").write_text("A note about rivers and the towns along them.\n" * 3)
    here = os.getcwd()
    os.chdir(folder)
    try:
        run_pretrain("config.json", device="cpu", quiet=True)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def at(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage, as the current folder."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    return folder


def outcome(capsys: pytest.CaptureFixture[str], program: Callable[[list[str]], int], *arguments: str) -> Outcome:
    """Exit status and stderr; anything a program lets escape fails the test."""
    capsys.readouterr()
    try:
        status = program(list(arguments))
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the logs of runs and the notes of what was verified, which an attempt may begin."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "runs" and path.name != ".verified"
    }


def assert_refused(found: Outcome, *words: str, usage: bool = False) -> None:
    status, err = found
    errors = [line for line in err.splitlines() if "error" in line or "✗" in line]
    assert status == (2 if usage else 1), err
    assert len(errors) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


def changed(config: Path, path: str, value: Any) -> None:
    content = json.loads(config.read_text())
    *parents, last = path.split(".")
    section = content
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("model.dropuot", 0.1, ("model.dropuot", "dropout")),
        ("training.pretrain.mcro_B", 4, ("training.pretrain.mcro_B", "micro_B")),
        ("model.H", 3, ("C", "H", "32", "3")),
        ("data.mix_pretrain", {"primer": 0.7}, ("data.mix_pretrain", "sum", "0.7")),
        ("data.mix_pretrain", {"primmer": 1.0}, ("primmer", "primer")),
        ("model.T", -1, ("model.T", "-1")),
        ("training.pretrain.base_lr", "fast", ("training.pretrain.base_lr", "fast")),
    ],
)
def test_a_wrong_setting(
    at: Path, capsys: pytest.CaptureFixture[str], setting: str, value: Any, words: tuple[str, ...]
) -> None:
    changed(at / "config.json", setting, value)
    before = contents(at)
    assert_refused(outcome(capsys, train_run.main, "--phase", "pretrain", "--config", "config.json"), *words)
    assert contents(at) == before


def test_a_wrong_flag_or_a_missing_config(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(at)
    assert_refused(outcome(capsys, train_run.main, "--phase", "pretrian", "--config", "config.json"), usage=True)
    assert_refused(outcome(capsys, train_run.main, "--phase", "pretrain", "--config", "absent.json"), "absent.json")
    assert_refused(outcome(capsys, chat_cli.main, "--ckpt", "absent.pt", "--prompt", "hello"), "absent.pt")
    assert_refused(
        outcome(capsys, chat_cli.main, "--ckpt", "x", "--temperature", "-1", "--prompt", "a"), "temperature", usage=True
    )
    assert contents(at) == before


def test_a_missing_or_empty_source(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--config", "config.json", "--cache-dir", "cache")
    before = contents(at)
    found = outcome(capsys, cache_cli.main, "build", "text", "--text-dir", "nowhere", *common)
    assert_refused(found, "text", "nowhere")
    (at / "notes/a.md").write_text("")
    before["notes/a.md"] = b""
    found = outcome(capsys, cache_cli.main, "build", "text", "--text-dir", "notes", *common)
    assert_refused(found, "text", "no text")
    assert contents(at) == before


@pytest.mark.parametrize("damage", ["truncated", "one bit", "gone"])
def test_a_damaged_cache_shard(at: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    shard = at / "cache/pretrain/primer/train/shard_00000.bin"
    whole = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        middle = len(whole) // 2
        shard.write_bytes(whole[:-2] if damage == "truncated" else _flipped(whole, middle))
    before = contents(at)
    checked = outcome(capsys, cache_cli.main, "verify", "primer", "--config", "config.json")
    assert_refused(checked, "shard_00000.bin")
    found = outcome(capsys, train_run.main, "--phase", "pretrain", "--config", "config.json", "--no-resume")
    assert_refused(found, "shard_00000.bin")
    assert contents(at) == before


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_cache_of_another_tokenizer(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = train_tokenizer(["Other words make other pieces. " * 50, "abc " * 99], at / "other", vocab_size=300)
    changed(at / "config.json", "tokenizer.model_path", str(other))
    before = contents(at)
    found = outcome(capsys, train_run.main, "--phase", "pretrain", "--config", "config.json", "--no-resume")
    assert_refused(found, "tokenizer hash mismatch", files.sha256_file(other)[:12])
    assert contents(at) == before


def _pickled_class(path: Path) -> None:
    torch.save({"model_state": {}, "evil": MakesAFolder()}, path)


class MakesAFolder:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize("damage", ["truncated", "one bit", "not a checkpoint", "a pickled class"])
def test_a_damaged_checkpoint(at: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    path = at / "checkpoints/best.pt"
    whole = path.read_bytes()
    path.unlink()  # it may be a hard link
    if damage == "a pickled class":
        _pickled_class(path)
    elif damage == "not a checkpoint":
        path.write_bytes(pickle.dumps([1, 2, 3]))
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else _flipped(whole, len(whole) // 2))
    before = contents(at)
    assert_refused(outcome(capsys, chat_cli.main, "--ckpt", "checkpoints/best.pt", "--prompt", "hello"), "best.pt")
    assert contents(at) == before and not (at / "pwned").exists()


def test_a_malformed_primer_line(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (at / "primer.jsonl").read_text().splitlines()
    lines[4] = '{"messages": [{"role": "user"}]}'
    (at / "primer.jsonl").write_text("\n".join(lines) + "\n")
    before = contents(at)
    arguments = ("build-sft-primer", "--primer-jsonl", "primer.jsonl", "--tokenizer", "spm.model", "--out-dir", "new")
    assert_refused(outcome(capsys, cache_cli.main, *arguments), "line 5")
    assert contents(at) == before


def test_a_prompt_longer_than_the_context(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message that cannot fit is refused; a conversation drops its oldest turns (tests/test_chat_cli.py)."""
    ask = ("--ckpt", "checkpoints/best.pt", "--system", "", "--max-new-tokens", "4", "--prompt")
    before = contents(at)
    assert_refused(outcome(capsys, chat_cli.main, *ask, "a long question " * T), "capacity", str(T))
    assert contents(at) == before


def test_no_space_left_on_the_disk(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fsync fails as on a full disk: named as such, and the checkpoints of before still load."""
    before = contents(at)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    changed(at / "config.json", "training.pretrain.total_steps", 8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        found = outcome(capsys, train_run.main, "--phase", "pretrain", "--config", "config.json")
        built = outcome(capsys, cache_cli.main, "build", "text", "--text-dir", "notes", "--config", "config.json")
    assert_refused(found, "disk is full", "runs")
    assert_refused(built, "disk is full", "text")
    after = contents(at)
    before["config.json"] = after["config.json"]
    assert after == before
    status, err = outcome(capsys, chat_cli.main, "--ckpt", "checkpoints/best.pt", "--system", "", "--prompt", "hi")
    assert status == 0, err
