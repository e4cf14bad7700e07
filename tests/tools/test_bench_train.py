"""The training benchmark: its peers are the models they are said to be; its arithmetic; a run at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from niels_gpt.config import V2, ModelConfig
from niels_gpt.model.gpt import GPT
from tools import bench_common, bench_peers, bench_train

TINY = {"V": 256, "T": 16, "C": 16, "L": 2, "H": 2, "d_ff": 24, "B": 3}


def ours(arch=V2) -> GPT:
    fields = {key: TINY[key] for key in bench_common.KEYS}
    return GPT(ModelConfig(**fields, dropout=0.0, rope_theta=10000.0), arch)


def test_the_materialised_model_is_the_published_architecture() -> None:
    model, plain = ours(), bench_peers.PlainModel(TINY, 0.0)
    names = {"fc_g": "gate", "fc_a": "up", "fc_out": "down", "attn.": "", "mlp.": "", "tok_emb": "wte"}
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    state.pop("lm_head.weight")
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith(("cos", "sin", "seen")) for name in missing)
    batch = bench_train.random_batch(TINY, "cpu")
    loss = plain(batch.x, batch.y)
    torch.testing.assert_close(loss, model(batch.x, batch.y) / batch.y.numel())


def test_flops_are_those_of_the_matrices() -> None:
    batch = bench_train.random_batch(TINY, "cpu")
    nano = bench_peers.nano_step(TINY, "fp32", batch.x, batch.y, compiled=False)
    assert nano.matmul_parameters == 256 * 16 + 2 * 12 * 16 * 16
    assert bench_peers.matmul_parameters(ours()) == 256 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24)
    assert bench_common.flops_per_token(TINY) == bench_common.flops_per_token(
        TINY, bench_peers.matmul_parameters(ours())
    )


@pytest.mark.parametrize("name", ["nanoGPT's shape", "materialised attention, dropout 0.1", "niels-gpt, Muon"])
def test_a_step_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_peers, "RATE", 0.01)  # at the benchmark's own, dropout decides which loss is lower
    torch.manual_seed(0)
    batch = bench_train.random_batch(TINY, "cpu")
    seen: list[float] = []
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda t, *a, **k: (seen.append(float(t.detach())), original(t))[1])
    step = bench_train.ALL[name](TINY, "fp32", batch).step
    for _ in range(30):
        step()
    assert seen[-1] < seen[0] and len(seen) == 30


def test_the_program_times_what_is_there_and_names_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> bench_peers.Candidate:
        raise ModuleNotFoundError("No module named 'litgpt'")

    monkeypatch.setitem(bench_common.SHAPES, "quickstart", TINY)
    for name in [name for name in bench_train.ALL if "litgpt" in name or "compiled" in name]:
        monkeypatch.setitem(bench_train.ALL, name, missing)
    out = tmp_path / "rows.json"
    arguments = ["--shape", "quickstart", "--rounds", "2", "--no-memory", "--json", str(out)]
    before = torch.get_num_threads()
    try:
        assert bench_train.main([*arguments, "--only", "niels-gpt, Muon", "litgpt", "nanoGPT", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(before)
    rows = {row["candidate"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"niels-gpt, Muon", "nanoGPT's shape"} <= set(rows) and "litgpt Llama" not in rows
    for row in rows.values():
        assert row["worst"] <= row["tokens_per_s"] <= row["best"] and len(row["seconds"]) == 2
        assert 0 < row["mfu"] <= 1
    seen = capsys.readouterr()
    assert "left out: litgpt Llama: No module named 'litgpt'" in seen.err
    assert "| nanoGPT's shape | " in seen.out and "GEMM peak of this run" in seen.out


def test_targets_are_compared_with_this_runs_figures(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, rate: float, mfu: float) -> dict[str, object]:
        return {"candidate": name, "tokens_per_s": rate, "mfu": mfu, "seconds": [1 / rate, 2 / rate]}

    rows = [row("niels-gpt, AdamW", 130, 0.7), row("transformers Llama", 100, 0.5)]
    bench_train.show_targets("default", rows)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "- niels-gpt, AdamW: 1.30 x transformers Llama (target 1.2; rounds 1.30..1.30)"
    assert out[1] == "- niels-gpt, AdamW: 0.700 of the GEMM peak (target 0.75)"


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    args = bench_train.argparse.Namespace(device="cpu", rows=None, threads=1)
    monkeypatch.setattr(bench_train.sys, "executable", "false")
    assert bench_train.peak_memory("quickstart", "nanoGPT's shape", "fp32", args) is None
    assert "memory of nanoGPT's shape" in capsys.readouterr().err
