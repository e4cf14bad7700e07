"""When nobody reads its output any more, training saves as after a signal, and goes on from there to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import checkpoint as ckpt
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.report import Reporter, StepReport
from tests.train import workshop


def test_a_closed_output_saves_and_ends_training(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    """As `python -m train.run ... | head -1` does."""
    workshop.build_caches(tmp_path, tiny_tokenizer)
    config = workshop.overrides(tmp_path, tiny_tokenizer, steps=4000, ckpt_every=4000, eval_every=4000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = workshop.command("--phase", "pretrain", "--config", tmp_path / "config.json", "--device", "cpu")
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=workshop.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == "the output was closed; run the same command again to go on\n"
    latest = ckpt.load_checkpoint(tmp_path / "checkpoints/pretrain/latest.pt", device="cpu")
    assert latest["step"] == max(workshop.steps_logged(tmp_path), default=0)


@pytest.mark.parametrize(("event", "at"), [("step", 5), ("step", 8), ("finish", 8)])
def test_after_a_closed_output_the_run_goes_on_to_the_same_bits(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, event: str, at: int
) -> None:
    """In the middle, where it saves; and with the last words, when all is saved."""
    world["training"]["pretrain"] |= {"total_steps": 8, "warmup_steps": 2, "ckpt_every": 100, "eval_every": 100}
    run_pretrain(world, device="cpu")
    straight = workshop.weights_sha(ckpt.phase_paths("pretrain").latest)
    shutil.rmtree("checkpoints")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as out, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        take = getattr(Reporter, event)

        def closing(self: Reporter, first: StepReport | int, *rest: float) -> None:
            if (first if isinstance(first, int) else first.step) == at:
                os.close(reading)
            take(self, first, *rest)

        patched.setattr(Reporter, event, closing)
        with pytest.raises(BrokenPipeError):
            run_pretrain(world, device="cpu")
    found = ckpt.load_checkpoint(ckpt.phase_paths("pretrain").latest, device="cpu")
    assert found["step"] == at and found["resume"] is not None
    assert found["resume"]["is_finished"] == (event == "finish")
    run_pretrain(world, device="cpu")
    assert workshop.weights_sha(ckpt.phase_paths("pretrain").latest) == straight
