"""docs/settings.md says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.settings import Settings
from niels_gpt.settings import doc as settings_doc
from niels_gpt.settings.errors import leaf_paths


def test_the_committed_page_is_current() -> None:
    assert settings_doc.main(["--check"]) == 0


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
    assert settings_doc.main(["--check", "--out", str(page)]) == 1
    assert "is stale; run python -m niels_gpt.settings.doc" in capsys.readouterr().err
    assert settings_doc.main(["--out", str(page)]) == 0
    assert settings_doc.main(["--check", "--out", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "x", encoding="utf-8")
    assert settings_doc.main(["--check", "--out", str(page)]) == 1


def test_print_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_doc.main(["--print", "--out", str(tmp_path / "x.md")]) == 0
    assert capsys.readouterr().out == settings_doc.document() and not list(tmp_path.iterdir())


def test_an_installation_prints_instead_of_writing_into_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    assert settings_doc.main([]) == 0
    assert capsys.readouterr().out == settings_doc.document() and not list(tmp_path.iterdir())
