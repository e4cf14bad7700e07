"""`tools/bench_trial.py` times the real training step at one setting, and says so in one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"V": 512, "T": 32, "C": 32, "L": 1, "H": 2, "d_ff": 64, "dropout": 0.1, "rope_theta": 10000.0}
TRIAL = {
    "device": "cpu",
    "model": MODEL,
    "amp": False,
    "amp_dtype": "fp16",
    "activation_checkpointing": False,
    "micro_B": 2,
    "steps_warmup": 1,
    "steps_measure": 3,
    "seed": 42,
}


def bench_trial(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/bench_trial.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_one_trial_is_one_line_of_json(tmp_path: Path) -> None:
    (tmp_path / "trial.json").write_text(json.dumps(TRIAL))
    done = bench_trial("--trial_json", str(tmp_path / "trial.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    row = json.loads(done.stdout)
    assert row["status"] == "ok"
    for name in ("device", "model", "amp", "amp_dtype", "activation_checkpointing", "micro_B"):
        assert row[name] == TRIAL[name]
    assert row["params"] == 512 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32 + 2 * 16
    assert row["ms_per_step"] == round(row["ms_per_step"], 2) > 0
    assert abs(row["tokens_per_sec"] * row["ms_per_step"] / 1000 - 2 * 32) < 1
    assert row["dtype_summary"] == {
        "autocast_enabled": "False",
        "attn_qkv": "torch.float32",
        "mlp_intermediate": "torch.float32",
        "logits": "torch.float32",
        "embed_param": "torch.float32",
    }
    assert 50 < row["memory"]["rss_mb"] < 2000
