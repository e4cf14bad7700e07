"""docs/settings.md says what the code says, and so does `niels-gpt settings`, which writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.settings import Settings
from niels_gpt.settings import doc as settings_doc
from niels_gpt.settings.errors import leaf_paths


def test_the_committed_page_is_current() -> None:
    assert settings_doc.update(["--check"]) == 0


def test_every_knob_has_a_row() -> None:
    page = settings_doc.document()
    assert page.count("\n| `") == len(list(leaf_paths(Settings)))
    assert "| `base_lr` | number | `0.0003` | > 0, ≤ 10 | peak learning rate of AdamW |" in page
    assert "| `keep_last` | whole number | `3` | ≥ 2 |" in page


def test_every_row_has_five_cells() -> None:
    for line in settings_doc.document().splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") == 6, line


def test_a_stale_page_fails_and_is_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "settings.md"
    assert settings_doc.update(["--check", "--out", str(page)]) == 1
    assert "is stale; run python -m niels_gpt.settings.doc" in capsys.readouterr().err
    assert settings_doc.update(["--out", str(page)]) == 0
    assert settings_doc.update(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "x", encoding="utf-8")
    assert settings_doc.update(["--check", "--out", str(page)]) == 1


def test_print_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_doc.update(["--print", "--out", str(tmp_path / "x.md")]) == 0
    assert capsys.readouterr().out == settings_doc.document() and not list(tmp_path.iterdir())


def test_an_installation_prints_instead_of_writing_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    assert settings_doc.update([]) == 0
    assert capsys.readouterr().out == settings_doc.document() and not list(tmp_path.iterdir())


def test_the_command_prints_the_page_and_touches_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    page = tmp_path / settings_doc.DOC
    page.parent.mkdir()
    page.write_text("mine")
    assert settings_doc.main([]) == 0
    assert capsys.readouterr().out == settings_doc.document() and page.read_text() == "mine"
    assert settings_doc.main(["--out", str(tmp_path / "new" / "page.md")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "new" / "page.md").read_text(encoding="utf-8") == settings_doc.document()


def test_the_command_prints_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_doc.main(["training.sft", "data.caches.seed"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("#")] == ["## data.caches", "## training.sft"]
    assert out.count("\n| `") == 1 + len([path for path in leaf_paths(Settings) if path.startswith("training.sft.")])
    assert settings_doc.main(["base_lr"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n| `base_lr`") == out.count("\n| `") == out.count("## training.") == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [("training.sfx", "training.sfx: unknown key; the nearest known one is training.sft"), ("model.T.x", "model.T.x:")],
)
def test_an_unknown_name_is_wrong_usage(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        settings_doc.main(["model", name])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == ""
    assert err.startswith("usage: niels-gpt settings ") and f"\nniels-gpt settings: error: {said}" in err


@pytest.mark.parametrize("program", [settings_doc.main, settings_doc.update])
def test_a_file_that_cannot_be_written_is_a_sentence(
    program: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert program(["--out", str(tmp_path / "file" / "x")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and str(tmp_path / "file") in err
