"""Several processes under torchrun do what one does: the same bits, however many, and together or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train import distributed
from niels_gpt.train.distributed import World, joined
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.pretrain import run_pretrain
from tests.train import workshop

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

STEPS = 50
CLIP = 0.05  # far below the norms of this model, so that every step is clipped
NO_CLIP = 1e9


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", *arguments]


def config(folder: Path, tokenizer: SentencePieceTokenizer, **phase: Any) -> dict[str, Any]:
    options = {"steps": STEPS, "eval_every": 20, "eval_steps": 3, "ckpt_every": 10, "keep_last": 9, "grad_clip": CLIP}
    return workshop.overrides(folder, tokenizer, **{**options, **phase})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A folder with caches, and a run of one process in `one`."""
    folder = tmp_path_factory.mktemp("distributed")
    workshop.build_caches(folder, tiny_tokenizer)
    alone(folder / "one", config(folder, tiny_tokenizer))
    return folder


def alone(folder: Path, settings: dict[str, Any], resume: Path | None = None) -> dict[str, Any]:
    """Train in this process."""
    folder.mkdir(exist_ok=True)
    here = Path.cwd()
    os.chdir(folder)
    try:
        return run_pretrain(settings, device="cpu", resume_path=resume, quiet=True)
    finally:
        os.chdir(here)


def together(folder: Path, cases: list[dict[str, Any]], processes: int = 2) -> None:
    """Run the cases in several processes started by torchrun."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        torchrun("tests.train.ranks", str(folder / "cases.json"), processes=processes),
        cwd=folder,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[:6000]}"
    assert "warning" not in done.stderr.lower(), done.stderr


def latest(folder: Path) -> Path:
    return folder / "checkpoints/pretrain/latest.pt"


def same(a: Path, b: Path) -> None:
    """Both runs have the same losses and the same weights, moments and best loss, to the bit."""
    assert workshop.steps_logged(a, "pretrain") == workshop.steps_logged(b, "pretrain")
    assert workshop.weights_sha(latest(a)) == workshop.weights_sha(latest(b))
    best = [load_checkpoint(latest(folder), device="cpu")["best_val_loss"] for folder in (a, b)]
    assert best[0] == best[1] is not None
    assert latest(a).stat().st_size == latest(b).stat().st_size  # nothing of the world is in the file


def largest_difference(a: Path, b: Path) -> float:
    x, y = (load_checkpoint(latest(folder), device="cpu")["model_state"] for folder in (a, b))
    return max(float((x[name] - y[name]).abs().max()) for name in x)


def test_two_processes_are_one(ground: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    """50 steps of DDP with dropout and clipping, elastic 1 -> 2 -> 1, and what one process alone sees go wrong."""
    ddp = config(ground, tiny_tokenizer)
    cases = [
        {"action": "run", "folder": "two", "config": ddp},
        {"action": "run", "folder": "elastic", "config": ddp, "resume": "one/checkpoints/pretrain/step_0000020.pt"},
        {"action": "poison", "folder": "poison", "config": ddp},
        {"action": "metric", "folder": "metric", "config": ddp, "resume": "one/checkpoints/pretrain/latest.pt"},
        {"action": "refusals", "folder": "refusals", "config": ddp},
    ]
    together(ground, [absolute(ground, case) for case in cases])
    same(ground / "one", ground / "two")

    assert min(workshop.steps_logged(ground / "elastic", "pretrain")) == 21
    (ground / "back").mkdir()
    shutil.copytree(ground / "one/runs", ground / "back/runs")  # the losses up to here
    alone(ground / "back", ddp, ground / "elastic/checkpoints/pretrain/step_0000040.pt")
    same(ground / "one", ground / "back")

    assert result(ground / "poison") == [[True, False, False, False, True]] * 2
    counted = alone(ground / "counted", ddp, latest(ground / "one"))  # nothing is left to do: it only evaluates
    assert counted["final_step"] == STEPS
    evals = result(ground / "metric")
    nats, tokens = evals[0]["primer"]
    assert evals[0] == evals[1] and float.fromhex(nats) / tokens == counted["last_val_loss"]
    main, other = result(ground / "refusals")
    assert main[0] == "ValueError: the disk has gone" and other[0].startswith(
        "MainFailed: process 0 failed: ValueError"
    )
    assert "data differs between the processes" in main[1] and "data differs between the processes" in other[1]


def absolute(ground: Path, case: dict[str, Any]) -> dict[str, Any]:
    paths = {key: str(ground / case[key]) for key in ("folder", "resume") if key in case}
    return {**case, **paths}


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())
