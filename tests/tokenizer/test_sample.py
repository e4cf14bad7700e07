"""Samples of the hub as files: budgets, line ends, hashes, and nothing half-written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.data import registry
from niels_gpt.data.registry import Source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer.sample import sample_fineweb, sample_wikitext, write_sample

ROWS = ["one\r\ntwo", "\u00e9" * 10, "three\n", "four"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Both sources with rows in memory; what they were asked for."""
    seen: list[Any] = []

    def stream(settings: Settings) -> Iterator[Document]:
        seen.append(settings.data.fineweb_edu)
        return (Document(text, "fineweb_edu") for text in ROWS)

    def documents(settings: Settings, split: str) -> Iterator[Document]:
        seen.append(split)
        return (Document(text, "wikitext") for text in ROWS)

    def describe(settings: Settings, phase: str) -> dict[str, Any]:
        return {}

    monkeypatch.setitem(registry.SOURCES, "fineweb_edu", Source("fineweb_edu", describe, stream=stream))
    monkeypatch.setitem(registry.SOURCES, "wikitext", Source("wikitext", describe, documents=documents))
    monkeypatch.setattr(registry, "PLANNED", (), raising=False)
    return seen


def test_fineweb_stops_after_the_row_that_reaches_the_budget(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "sample.txt"
    assert sample_fineweb(["--out", str(out), "--bytes", "9", "--name", "CC-1", "--dataset", "me/mine"]) == 0
    assert out.read_bytes() == "one\ntwo\n\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\n".encode()
    assert f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}" in capsys.readouterr().out
    (chosen,) = asked
    assert (chosen.dataset_id, chosen.name, chosen.split, chosen.shuffle) == ("me/mine", "CC-1", "train", False)
    assert sample_fineweb(["--out", str(out), "--bytes", "8"]) == 0
    assert out.read_bytes() == b"one\ntwo\n"
    assert sample_fineweb(["--out", str(out), "--bytes", "1000"]) == 0  # all there is
    assert out.read_text(encoding="utf-8").splitlines() == ["one", "two", "\u00e9" * 10, "three", "four"]


@pytest.mark.parametrize(
    ("budget", "content"),
    [(5, b"one\nt"), (8, b"one\ntwo\n"), (10, b"one\ntwo\n\n"), (12, "one\ntwo\n\n\u00e9".encode())],
)
def test_wikitext_is_cut_at_the_budget_between_characters(
    asked: list[Any], tmp_path: Path, budget: int, content: bytes
) -> None:
    out = tmp_path / "sample.txt"
    assert sample_wikitext(["--out", str(out), "--bytes", str(budget)]) == 0
    assert out.read_bytes() == content
    assert asked == ["train"]


def test_wikitext_rows_are_apart_by_a_blank_line(asked: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "sample.txt"
    assert sample_wikitext(["--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").split("\n\n") == ["one\ntwo", "\u00e9" * 10, "three", "four"]


def test_a_source_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "sample.txt"
    out.write_text("old")

    def texts() -> Iterator[str]:
        yield "new text"
        raise OSError("the connection broke")

    with pytest.raises(OSError, match="broke"):
        write_sample(texts(), out, 100, between="", after="\n", trim=False, progress=None)
    with pytest.raises(ValueError, match="no text came"):
        write_sample([], out, 100, between="", after="\n", trim=False, progress=None)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.txt"] and out.read_text() == "old"


@pytest.mark.parametrize("budget", ["0", "-1", "many"])
def test_a_budget_is_a_positive_number(budget: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as leave:
        sample_fineweb(["--out", str(tmp_path / "x"), f"--bytes={budget}"])
    assert leave.value.code == 2


def test_sentinels_never_get_into_a_sample(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.tokenizer.test_sample.ROWS", ["fine", f"bad {SPECIAL_TOKENS['sys']}"])
    assert sample_fineweb(["--out", str(tmp_path / "x"), "--bytes", "100"]) == 1
    assert "dataset=fineweb_edu doc_index=1" in capsys.readouterr().err and not (tmp_path / "x").exists()
