"""Saving while training: whatever the disk does, the run goes on and no checkpoint is lost; which ones are kept."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import checkpoint as ckpt
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.run import main
from tests.checkpoint.failing import FailingCall, newly_written
from tests.train import workshop


@pytest.mark.parametrize(
    "number",
    [pytest.param(errno.EIO, id="EIO"), pytest.param(errno.ENOSPC, id="ENOSPC", marks=pytest.mark.soak)],
)
def test_any_file_operation_may_fail_in_a_periodic_save(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """The N-th call fails, for every N: a warning, whole files, the best still to be beaten; later saves work."""
    loop = workshop.make_loop(world)
    loop._one_step()
    loop._save(False, on_schedule=True)
    root, failures, n = ckpt.phase_paths("pretrain").latest.parents[1].absolute(), 0, 0
    sound: set[tuple[int, ...]] = set()  # files that have loaded, and have not changed since
    monkeypatch.setattr("niels_gpt.paths.CHECKPOINT_DIR", root)
    while True:
        n += 1
        loop.state.step += 1
        loop.state.best_val_loss, loop.state.best_step, loop._best_before = 1.0, loop.state.step, (2.0, 1)
        with monkeypatch.context() as patch:
            failing = FailingCall(n, number, root, patch)
            loop._save(True, on_schedule=True)
        said = capsys.readouterr().err
        if said:
            failures += 1
            assert f"warning: step {loop.state.step}: not saved: " in said and "trying again at the next save" in said
            assert ("disk is full" in said) == (number == errno.ENOSPC)
            assert (loop.state.best_val_loss, loop.state.best_step) == (2.0, 1)
        for path in newly_written(root, sound):
            assert ckpt.load_checkpoint(path, device="cpu")["step"] >= 1
        assert ckpt.newest_good("pretrain") is not None and not list(root.rglob("*.tmp"))
        if failing.count < n:
            break
    assert failures > 30
    assert ckpt.load_checkpoint(ckpt.phase_paths("pretrain").best, device="cpu")["step"] == loop.state.step


def test_a_disk_that_fills_up_and_is_cleared(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Real writes that fail halfway, which torch.save reports as anything but a full disk."""
    loop = workshop.make_loop(world, ckpt_every=1, eval_every=100, total_steps=4)
    loop._one_step()
    latest = ckpt.phase_paths("pretrain").latest
    before = latest.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        loop._one_step()
        loop._one_step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("not saved: the disk is full") == 2
    assert latest.read_bytes() == before and not list(latest.parent.glob(".*"))
    assert loop.run().state.step == 4
    assert ckpt.load_checkpoint(latest, device="cpu")["step"] == 4


def test_a_last_save_that_fails_is_a_failure(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world["training"]["pretrain"] |= {"total_steps": 3, "save_best": False}
    (tmp_path / "config.json").write_text(json.dumps(world))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        assert main(["--phase", "pretrain", "--config", "config.json", "--device", "cpu"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "the disk is full" in said and said.count("\n") == 1


def test_what_is_kept(world: dict[str, Any]) -> None:
    world["training"]["pretrain"] |= {"total_steps": 21, "ckpt_every": 1, "eval_every": 100, "keep_every": 6}
    run_pretrain(world, device="cpu", quiet=True)
    kept = sorted(int(p.stem[5:]) for p in ckpt.phase_paths("pretrain").step_dir.glob("step_*.pt"))
    assert kept == [6, 12, 18, 19, 20, 21]


def test_the_place_to_go_back_to_is_kept_however_old(world: dict[str, Any]) -> None:
    loop = workshop.make_loop(world, keep_last=2)
    for step in range(1, 8):
        loop.state.step = step
        loop.state.skipped_in_a_row = int(step > 1)
        loop._save(False, on_schedule=True)
    kept = sorted(int(p.stem[5:]) for p in ckpt.phase_paths("pretrain").step_dir.glob("step_*.pt"))
    assert kept == [1, 6, 7] and loop.state.good_step == 1
