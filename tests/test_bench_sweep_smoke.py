"""`tools/bench_sweep.py` finds the largest microbatch of a grid's configurations and writes its three files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.hub.worker import run_command

ROOT = Path(__file__).resolve().parents[1]
GRID = [{"T": 32, "C": 32, "L": 1, "H": 2, "d_ff": 64, "amp": False, "amp_dtype": "fp16"}]
FLAGS = ["--device", "cpu", "--max_micro_B", "2", "--steps_warmup", "1", "--steps_measure", "2", "--timeout_s", "60"]


def test_a_sweep_measures_and_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.json").write_text(json.dumps(GRID))
    command = ["python", str(ROOT / "tools/bench_sweep.py"), *FLAGS, "--grid", "grid.json", "--out_dir", "bench/"]
    assert run_command(shlex.join(command), "") == 0  # in this process, its trials in processes of their own
    said = capfd.readouterr().out
    assert "1 rows:" in said and "2 rows:" in said and "left" in said
    rows = [json.loads(line) for line in (tmp_path / "bench/results.jsonl").read_text().splitlines()]
    assert [row["micro_B"] for row in rows] == [1, 2] and all(row["status"] == "ok" for row in rows)
    table = (tmp_path / "bench/summary.md").read_text()
    assert "**Device:** cpu" in table
    assert "| Rank | V | T | C | L | H | d_ff | AMP | Ckpt | micro_B | ms/step | tok/s | tok_8h | params |" in table
    assert "| 1 ⭐ | 16000 | 32 | 32 | 1 | 2 | 64 | False | False |" in table
    page = (tmp_path / "bench/summary.html").read_text()
    assert "<svg" in page and "http" not in page
