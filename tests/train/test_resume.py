"""Kill it at any instant: the resumed run has the same losses and the same weights, to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.train import workshop

STEPS = 60


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A pipeline of 60 + 60 steps that nothing disturbed."""
    return pipeline(tmp_path_factory.mktemp("straight"), tiny_tokenizer, run=True)


def pipeline(folder: Path, tokenizer: SentencePieceTokenizer, *, run: bool) -> Path:
    workshop.build_caches(folder, tokenizer)
    config = workshop.overrides(folder, tokenizer, steps=STEPS, eval_every=13, ckpt_every=7)
    (folder / "both.json").write_text(json.dumps(config))
    names = {"pretrain_config_path": "both.json", "sft_config_path": "both.json"}
    (folder / "pipeline.json").write_text(json.dumps(names))
    if run:
        workshop.run(folder, "--phase", "pipeline", "--config", "pipeline.json", "--device", "cpu")
    return folder


def test_three_kills_change_nothing(straight: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    folder = pipeline(tmp_path, tiny_tokenizer, run=False)
    rng = random.Random(7)
    pretrain = ("--phase", "pretrain", "--config", "both.json", "--device", "cpu")
    for low, high in ((8, 20), (24, 36), (40, 55)):
        workshop.kill_at(folder, "pretrain", rng.randint(low, high), rng, *pretrain)
    resumed = workshop.run(folder, *pretrain)
    assert "resumed from" in resumed.stdout
    assert workshop.steps_logged(folder, "pretrain") == workshop.steps_logged(straight, "pretrain")
    latest = "checkpoints/pretrain/latest.pt"
    assert workshop.weights_sha(folder / latest) == workshop.weights_sha(straight / latest)


def test_a_pipeline_killed_in_both_phases(
    straight: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    folder = pipeline(tmp_path, tiny_tokenizer, run=False)
    rng = random.Random(11)
    both = ("--phase", "pipeline", "--config", "pipeline.json", "--device", "cpu")
    workshop.kill_at(folder, "pretrain", 25, rng, *both)
    workshop.kill_at(folder, "sft", 30, rng, *both)
    workshop.run(folder, "--phase", "sft", "--config", "both.json", "--device", "cpu")
    assert len(workshop.steps_logged(straight, "sft")) == STEPS
    for phase in ("pretrain", "sft"):
        assert workshop.steps_logged(folder, phase) == workshop.steps_logged(straight, phase), phase
        for name in ("latest.pt", "best.pt"):
            path = f"checkpoints/{phase}/{name}"
            assert workshop.weights_sha(folder / path) == workshop.weights_sha(straight / path), path
    assert (folder / "checkpoints/best.pt").read_bytes() == (folder / "checkpoints/sft/best.pt").read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(20))
def test_two_to_six_kills_at_any_step(
    straight: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, seed: int
) -> None:
    folder = pipeline(tmp_path, tiny_tokenizer, run=False)
    rng = random.Random(seed)
    pretrain = ("--phase", "pretrain", "--config", "both.json", "--device", "cpu")
    for step in sorted(rng.sample(range(1, STEPS - 4), rng.randint(2, 6))):
        workshop.kill_at(folder, "pretrain", step, rng, *pretrain)
    workshop.run(folder, *pretrain)
    assert workshop.steps_logged(folder, "pretrain") == workshop.steps_logged(straight, "pretrain")
    latest = "checkpoints/pretrain/latest.pt"
    assert workshop.weights_sha(folder / latest) == workshop.weights_sha(straight / latest)
