"""`niels-gpt notes`: the report for people and machines, the dry run, and the cache it builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from niels_gpt import cli
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.data.notes.planted import CARD, KEYS, MAIL, PHONE, TRUTH, plant


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "vault")
    config = {"tokenizer": {"model_path": str(tiny_tokenizer.model_path), "vocab_size": 512}, "model": {"V": 512}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_a_dry_run_shows_all_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(here)
    assert cli.main(["notes", "--dir", "vault", "--dry-run", "--config", "c.json"]) == 0
    out, err = capsys.readouterr()
    assert files(here) == before and err == ""
    for line in (
        "vault: 60 markdown",
        "44 documents",
        "8 documents share passages",
        "dropped, exact duplicate: 10",
        "  later/copy 0.md of daily/01.md",
        "  and 2 more (--json names all)",
        "dropped, near duplicate: 5",
        "dropped, empty: 1",
        "not opened, link: 1\n  round loops",
        "decoded: 1\n  wide.md from UTF-16",
        "secrets, masked: 1 card, 1 e-mail, 3 key, 1 phone",
        "  secret/aws.md: 1 key",
        "--- secret/openai.md, cleaned",
        "The key is [key] and stays here.",
        "build the cache with: niels-gpt notes --source roam --dir vault --config c.json",
    ):
        assert line in out, line
    assert out.count("\n--- ") == 2
    assert not any(secret in out for secret in (*KEYS, MAIL, PHONE, CARD))


def test_the_dry_run_needs_no_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["notes", "--dir", "vault", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"]["estimated_tokens"] == round(report["kept"]["bytes"] / 4)
    assert {one["name"] for one in report["dropped"]["exact duplicate"]} == TRUTH["exact duplicate"]
    assert "cache" not in report
    assert cli.main(["notes", "--dir", "vault"]) == 1
    assert "there is no tokenizer model" in capsys.readouterr().err


def test_without_a_dry_run_the_cache_is_built_that_the_cache_command_keeps(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", "c.json", "--cache-dir", "caches"]
    assert cli.main(["notes", "--dir", "vault", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    meta = json.loads((here / "caches/pretrain/roam/meta.json").read_text())
    assert report["cache"]["tokens"] == {"train": meta["train_tokens"], "val": meta["val_tokens"]}
    assert report["kept"]["estimated_tokens"] == pytest.approx(sum(report["cache"]["tokens"].values()), rel=0.02)
    assert cli.main(["notes", "--dir", "vault", *flags]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert cli.main(["cache", "build", "roam", "--roam-dir", "vault", *flags]) == 0
    assert "up to date" in capsys.readouterr().out


def test_the_source_text_reads_every_kind(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = here / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("plain [[text]] stays")
    (mine / "b.html").write_text("<h1>Page</h1><p>with a paragraph</p>")
    (mine / "é.jsonl").write_text('{"text": "the first record"}\n{"text": "another one"}\n{bad\n')
    assert cli.main(["notes", "--source", "text", "--dir", "mine", "--dry-run", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert out.isascii()  # whatever the encoding of stdout is
    assert report["files"] == {"html": 1, "jsonl": 1, "text": 1} and report["kept"]["documents"] == 4
    assert report["dropped"] == {"no text": [{"name": "é.jsonl#3", "detail": ""}]}


def test_mistakes_end_without_a_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["notes", "--dir", "gone", "--dry-run"]) == 1
    assert "error: there is no folder gone" in capsys.readouterr().err
    (here / "none").mkdir()
    (here / "none" / "a.md").touch()
    assert cli.main(["notes", "--dir", "none", "--dry-run"]) == 1
    assert "no text to train on: 1 empty in none" in capsys.readouterr().err
    assert cli.main(["notes", "--config", "gone.json"]) == 1
    assert "gone.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["notes", "--source", "wiki"])
    assert caught.value.code == 2
