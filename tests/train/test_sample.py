"""Sample texts and utilisation: what they are, and that training never notices them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from niels_gpt import checkpoint as ckpt
from niels_gpt.config import NEW, Architecture, ModelConfig
from niels_gpt.device import Precision
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import validate_overrides
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.metrics import read_metrics
from niels_gpt.train.mfu import matmul_peak, training_flops
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.runs_cli import main as runs
from niels_gpt.train.sample import Sample, sampler_for
from tests.train import workshop


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(V=workshop.V, T=workshop.T, C=32, L=2, H=2, d_ff=64, dropout=0.1, rope_theta=1e4))


@pytest.mark.parametrize("phase", ["pretrain", "sft"])
def test_a_sample_is_repeatable_and_leaves_no_trace(
    phase: str, model: GPT, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    settings = validate_overrides(workshop.overrides(tmp_path, tiny_tokenizer, sample_prompt="who?", sample_tokens=8))
    sample = sampler_for(phase, settings, tiny_tokenizer)
    assert sample is not None
    before = torch.get_rng_state()
    first = sample(model)
    assert isinstance(first, Sample) and first.prompt == "who?" and first.text
    assert sample(model) == first and model.training
    assert torch.equal(torch.get_rng_state(), before)
    loss = model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    loss.backward()  # nothing that was made for generation is in the way of a gradient
    with torch.no_grad():
        model.ln_f.weight.fill_(float("nan"))
    broken = sample(model)
    assert broken is not None and "non-finite" in broken.text


def test_pretraining_samples_as_the_settings_say(
    model: GPT, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    config = workshop.overrides(tmp_path, tiny_tokenizer, sample_prompt="who?", sample_tokens=8)
    said = []
    for generation in ({"temperature": 0.0}, {"temperature": 1.5, "min_p": 1.0}):  # both leave the likeliest token only
        sample = sampler_for("pretrain", validate_overrides({**config, "generation": generation}), tiny_tokenizer)
        assert sample is not None
        said.append(sample(model))
    assert said[0] == said[1]


def test_no_prompt_no_sample(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, model: GPT) -> None:
    settings = validate_overrides(workshop.overrides(tmp_path, tiny_tokenizer, sample_prompt=None))
    assert sampler_for("pretrain", settings, tiny_tokenizer) is None
    long = validate_overrides(workshop.overrides(tmp_path, tiny_tokenizer, sample_prompt="why? " * 50))
    ask = sampler_for("sft", long, tiny_tokenizer)
    assert ask is not None and ask(model) is None  # a question beyond the context


def test_samples_and_boards_change_no_weight(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shas = []
    for changes in ({"tensorboard": True}, {"tensorboard": False, "sample_prompt": None}):
        shutil.rmtree("checkpoints", ignore_errors=True)
        shutil.rmtree("runs", ignore_errors=True)
        world["training"]["pretrain"] |= changes
        run_pretrain(world, device="cpu")
        shas.append(workshop.weights_sha(ckpt.phase_paths("pretrain").latest))
        out = capsys.readouterr().out
        assert ("[pretrain] sample: Once upon a time -> " in out) == changes["tensorboard"]
        assert changes["tensorboard"] or not list(Path("runs").glob("*/tensorboard"))
    assert shas[0] == shas[1]


def test_a_run_records_where_its_time_went_and_goes_on_from_there(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_pretrain(world, device="cpu")
    out = capsys.readouterr().out
    assert re.search(r"\[pretrain\] val_primer_bpb \d\.\d{4}\n", out) and "where the time went" in out
    assert re.search(r"\[pretrain\] \d+:\d\d left \| [\d,]+ tok/s \| loss .* \| MFU \d+% .*GiB\n", out)
    (metrics,) = Path("runs").glob("*/metrics.jsonl")
    entries = read_metrics(metrics)
    assert [e["step"] for e in entries if e["kind"] == "step"] == list(range(1, 13))
    assert all(0 < e["mfu"] < 2 for e in entries if e["kind"] == "step")
    assert [set(e["bits_per_byte"]) for e in entries if e["kind"] == "eval"] == [{"primer"}] * 3
    before = entries[-1]
    assert before["kind"] == "time" and all(seconds > 0 for seconds in before["seconds"].values())
    assert metrics.with_name("report.html").is_file()
    assert runs(["show", metrics.parent.name]) == 0
    world["training"]["pretrain"]["total_steps"] = 14
    run_pretrain(world, device="cpu", quiet=True)
    entries = read_metrics(metrics)
    assert [e["step"] for e in entries if e["kind"] == "step"] == list(range(1, 15))
    after = entries[-1]["seconds"]
    assert all(after[phase] > seconds for phase, seconds in before["seconds"].items())
    json.dumps(entries, allow_nan=False)


@pytest.mark.parametrize("arch", [NEW, Architecture("layernorm", "gelu", True, False)], ids=["new", "v1"])
def test_flops_are_what_a_counter_counts(arch: Architecture) -> None:
    cfg = ModelConfig(V=64, T=16, C=32, L=2, H=2, d_ff=48, dropout=0.0, rope_theta=1e4)
    model = GPT(cfg, arch).eval()
    x = torch.zeros(3, cfg.T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, x)
    assert set(counter.get_flop_counts()["Global"]) <= {torch.ops.aten.mm, torch.ops.aten.addmm}  # no attention: fused
    forward = counter.get_total_flops() / x.numel() + 2 * cfg.L * cfg.T * cfg.C  # two products of half a square
    assert 3 * forward == pytest.approx(training_flops(model))


def test_the_peak_is_measured_once_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    precision = Precision("cpu", None, False, "a test")
    peak = matmul_peak(precision)
    assert 1e8 < peak < 1e15 and matmul_peak(precision) == peak
    assert torch.equal(torch.get_rng_state(), before)
