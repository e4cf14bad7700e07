"""Where the system prompt comes from."""

from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.chat import options, system_prompt


def test_file_then_text_then_configs_here_then_shipped_then_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.txt"
    file.write_text("from a file\n", encoding="utf-8")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/system_surly.txt").write_text("from here\n", encoding="utf-8")
    assert system_prompt(str(file), "given") == "from a file"
    assert system_prompt(None, "given") == "given"
    assert system_prompt(None, "") == ""
    assert system_prompt() == "from here"
    (tmp_path / "configs/system_surly.txt").unlink()
    assert system_prompt() == paths.shipped("configs/system_surly.txt").read_text(encoding="utf-8").strip()
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    assert system_prompt() == options.BUILT_IN_SYSTEM
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        system_prompt(str(file))
