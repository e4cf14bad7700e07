"""What only a GPU can show: memory that really runs out, fp16 with its scaler, and resuming to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.train.pretrain import run_pretrain
from tests.train import workshop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def losses(folder: Path) -> dict[int, float]:
    found = {n: float.fromhex(x) for n, x in workshop.steps_logged(folder).items()}
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "checkpoints")
    return found


def test_out_of_memory_is_the_same_batch_in_smaller_pieces(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world["model"] |= {"dropout": 0.0, "C": 128, "d_ff": 512}
    world["training"]["pretrain"] |= {"micro_B": 4096, "accum_steps": 1, "total_steps": 3, "eval_steps": 1}
    run_pretrain(world, device="cuda", quiet=True)
    free = losses(tmp_path)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5e9 / total)
    try:
        run_pretrain(world, device="cuda", quiet=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with microbatches of 4096 rows" in capsys.readouterr().err
    assert losses(tmp_path) == pytest.approx(free, abs=1e-4)


@pytest.mark.parametrize(
    "amp", [{"amp": False}, {"amp": True, "amp_dtype": "bf16"}, {"amp": True, "amp_dtype": "fp16"}]
)
def test_a_resumed_run_is_the_same(
    world: dict[str, Any], tmp_path: Path, amp: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world["training"]["pretrain"] |= amp
    straight = workshop.weights_sha(run_pretrain(world, device="cuda", quiet=True)["latest_path"])
    expected = losses(tmp_path)
    world["training"]["pretrain"] |= {"ckpt_every": 5, "eval_every": 100}
    run_pretrain(world, device="cuda", quiet=True)
    for name in ("latest.pt", "step_0000012.pt"):
        (ckpt.phase_paths("pretrain").step_dir / name).unlink()
    resumed = workshop.weights_sha(run_pretrain(world, device="cuda", quiet=True)["latest_path"])
    assert "not exact" not in capsys.readouterr().err and resumed == straight
    assert losses(tmp_path) == expected


def test_compiled_training_learns_the_same(world: dict[str, Any], tmp_path: Path) -> None:
    world["model"]["dropout"] = 0.0
    run_pretrain(world, device="cuda", quiet=True)
    eager = losses(tmp_path)
    world["training"]["pretrain"]["compile"] = True
    run_pretrain(world, device="cuda", quiet=True)
    record = ckpt.load_checkpoint(ckpt.phase_paths("pretrain").latest, device="cpu")["resume"]
    assert record is not None and record["compiled"]
    assert losses(tmp_path) == pytest.approx(eager, abs=2e-2)
