"""The published training run, from its start weights and its batches: 30 + 12 steps end in the recorded weights.

Its sampler keeps one generator over the whole run; ours seeds every batch by its step. So the test draws the batches
the published way and hands them to our loop. Two things differ on purpose and are put back here: the published trainer
keeps the first T+1 tokens of a long chat (we keep the last), and its chat batches are padded, not packed.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.batching import Batch, draw_sources, get_batch
from niels_gpt.cache.format import SftExamples
from niels_gpt.cache.pretrain import open_mix as open_text_mix
from niels_gpt.cache.sft import open_mix as open_chat_mix
from niels_gpt.model.loss import IGNORED
from niels_gpt.train.job import Job
from niels_gpt.train.loop import train
from niels_gpt.train.pretrain import pretrain_job
from niels_gpt.train.report import Reporter
from niels_gpt.train.sft import sft_job
from niels_gpt.train.start import Start, start_phase
from tests.reference import BUNDLE, needs_bundle

RUN = BUNDLE / "v2/train_run"
T, B, EOT = 64, 4, 6
pytestmark = needs_bundle


def published_overrides() -> dict[str, Any]:
    text = (RUN / "overrides.json").read_text().replace("<BUNDLE>", str(BUNDLE))
    overrides = json.loads(text)
    overrides["model"] |= {"mlp_bias": True, "qk_norm": False}
    for phase in overrides["training"].values():
        phase["amp"] = False
    return overrides


def begin(phase: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Start:
    monkeypatch.chdir(folder)
    return start_phase(phase, published_overrides(), device="cpu", resume_path=None, no_auto_resume=True)


def logged_losses(phase: str) -> list[float]:
    pattern = rf"\[{phase}\] step \d+/\d+ \| lr \S+ \| train_loss (\S+)"
    return [float(loss) for loss in re.findall(pattern, (RUN / "stdout.log").read_text())]


def moving_average(folder: Path, phase: str) -> list[float]:
    (path,) = folder.glob("runs/*/metrics.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [e["mean_loss"] for e in entries if e["kind"] == "step" and e["phase"] == phase]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    a, b = (ckpt.load_checkpoint(path, device="cpu") for path in (ours, theirs))
    assert a["step"] == b["step"]
    for name, tensor in b["model_state"].items():
        torch.testing.assert_close(a["model_state"][name], tensor, atol=2e-5, rtol=0, msg=name)


def with_batches(job: Job, batches: Any) -> Job:
    return replace(job, batch=lambda first, rows: next(batches))


def test_thirty_steps_of_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = begin("pretrain", monkeypatch, tmp_path)
    job = pretrain_job(start)
    streams, mix = open_text_mix(start.settings, start.tokenizer, "train", T)
    generator = torch.Generator().manual_seed(42)
    batches = (Batch(*get_batch(streams, mix, B, T, "cpu", generator)) for _ in range(60))
    reporter = Reporter("pretrain", start.resolved.run_id, quiet=True)
    train(with_batches(job, batches), device="cpu", reporter=reporter, init=RUN / "step0_init.pt")
    assert moving_average(tmp_path, "pretrain") == pytest.approx(logged_losses("pretrain"), abs=6e-5)
    assert_same_weights(tmp_path / "checkpoints/pretrain/latest.pt", RUN / "pretrain/latest.pt")


def published_chat_batch(sources: dict[str, SftExamples], mix: dict[str, float], generator: torch.Generator) -> Batch:
    ids, labels = np.full((B, T + 1), EOT), np.full((B, T + 1), IGNORED)
    for row, name in enumerate(draw_sources(mix, B, generator)):
        source = sources[name]
        chosen = int(torch.randint(len(source), (1,), generator=generator))
        tokens, marks = source.example(chosen)
        n = min(len(tokens), T + 1)
        ids[row, :n], labels[row, :n] = tokens[:n], marks[:n]
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels[:, 1:].copy()))


def test_twelve_steps_of_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = begin("sft", monkeypatch, tmp_path)
    sources, mix = open_chat_mix(start.settings, start.tokenizer, "train")
    generator = torch.Generator().manual_seed(42)
    batches = (published_chat_batch(sources, mix, generator) for _ in range(12))
    reporter = Reporter("sft", start.resolved.run_id, quiet=True)
    init = RUN / "pretrain/latest.pt"  # the best there was its latest: the loss fell to the end
    train(with_batches(sft_job(start), batches), device="cpu", reporter=reporter, init=init)
    assert moving_average(tmp_path, "sft") == pytest.approx(logged_losses("sft"), abs=6e-5)
    assert_same_weights(tmp_path / "checkpoints/sft/latest.pt", RUN / "sft/latest.pt")
