"""What is evaluated when, and which checkpoint becomes the best one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.eval import EvalResult
from niels_gpt.train.signals import StopRequest
from tests.train import workshop


def test_only_a_better_one_becomes_the_best(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses 3, 2, 4, 2 at every second step: the file of the second stays as it is, byte for byte."""
    loop = workshop.make_loop(world, total_steps=8, eval_every=2, ckpt_every=100, sample_prompt=None)
    losses, best = iter((3.0, 2.0, 4.0, 2.0)), ckpt.phase_paths("pretrain").best
    seen: dict[int, bytes | None] = {}

    def measure(stop: StopRequest) -> dict[str, EvalResult]:
        seen[loop.state.step] = best.read_bytes() if best.is_file() else None
        return {"primer": EvalResult(next(losses), 1)}

    monkeypatch.setattr(loop.evaluation, "measure", measure)
    state = loop.run().state
    assert list(seen) == [2, 4, 6, 8]
    assert (state.best_step, state.best_val_loss) == (4, 2.0)
    assert seen[2] is None and seen[4] not in (None, seen[6]) and seen[6] == seen[8] == best.read_bytes()
    assert ckpt.load_checkpoint(best, device="cpu")["step"] == 4
    assert ckpt.load_checkpoint(ckpt.phase_paths("pretrain").latest, device="cpu")["step"] == 8


@pytest.mark.parametrize("phase", ["pretrain", "sft"])
def test_every_evaluation_is_of_the_same_rows(world: dict[str, Any], phase: str) -> None:
    loop = workshop.make_loop(world, phase)
    names = {"pretrain": {"primer"}, "sft": {"pretrain", "sft"}}[phase]
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # as dropout does at every step
        loop.train_step(seed)
        drawn.append({name: [(b.x, b.y) for b in batches()] for name, batches in loop.job.evals.items()})
    first, second = drawn
    assert set(first) == set(second) == names
    for name in names:
        assert len(first[name]) == len(second[name]) > 0
        for before, after in zip(first[name], second[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    rows = torch.cat([x for x, _ in first[min(names)]])
    assert len(torch.unique(rows, dim=0)) > 1  # not one row over and over
