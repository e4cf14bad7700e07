"""The shares of a real, short run add up, and what is slow shows where it is."""

from __future__ import annotations

import json
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
    draw = pretrain.MixedRows.batch
    monkeypatch.setattr(pretrain.MixedRows, "batch", lambda *a: (time.sleep(0.05), draw(*a))[1])
    Path("config.json").write_text(json.dumps(workshop.overrides(tmp_path, tiny_tokenizer)))
    arguments = ["--config", "config.json", "--minutes", "0.05", "--json", "shares.json", "--out", "kept"]
    assert bench_phases.main(arguments) == 0
    found = json.loads(Path("shares.json").read_text())
    shares = found["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) == {"step", "data", "evaluation", "saving", "logging", "rest"}
    assert shares["data"] > shares["logging"] and all(share >= -1e-6 for share in shares.values())
    assert Path("kept/checkpoints/pretrain/latest.pt").is_file() and not Path("checkpoints").exists()
    assert "| data | " in capsys.readouterr().out


def test_missing_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_phases.main(["--config", "nowhere.json"]) == 1
    assert "nowhere.json" in capsys.readouterr().err
