"""What takes time in a real, short run shows where it is, and fails the check."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train import pretrain
from tests.train import workshop
from tools import bench_phases


def test_a_slow_phase_shows_where_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: SentencePieceTokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workshop.build_caches(tmp_path, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", paths.CHECKPOINT_DIR)
    monkeypatch.setattr(paths, "RUNS_DIR", paths.RUNS_DIR)
    draw = pretrain.TextRows.batch
    monkeypatch.setattr(pretrain.TextRows, "batch", lambda *a: (time.sleep(0.1), draw(*a))[1])
    Path("config.json").write_text(json.dumps(workshop.overrides(tmp_path, tiny_tokenizer)))
    arguments = ["--config", "config.json", "--minutes", "0.05", "--out", "kept", "--limit"]
    assert bench_phases.main([*arguments, "0.001"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"│ data +│", out) and "over the limit of 0.10%: pretrain: data took" in err
    assert Path("kept/checkpoints/pretrain/latest.pt").is_file() and not Path("checkpoints").exists()
    assert bench_phases.main([*arguments, "0.999"]) == 0


def test_missing_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_phases.main(["--config", "nowhere.json"]) == 1
    assert "nowhere.json" in capsys.readouterr().err
