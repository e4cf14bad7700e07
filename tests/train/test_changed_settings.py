"""A run that is gone on with under other settings, or by another phase: what applies, what is said, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import checkpoint as ckpt
from niels_gpt.train.loop import Loop
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.run import main
from niels_gpt.train.sft import run_sft
from niels_gpt.train.start import TimeLimit, start_phase
from niels_gpt.train.state import RunState
from tests.train import workshop


def saved(world: dict[str, Any], best: float | None = None, **changes: Any) -> Loop:
    """A run that has saved after a step; with a best loss, as its best."""
    loop = workshop.make_loop(world, **changes)
    loop._one_step()
    loop.state.best_val_loss, loop.state.best_step = best, None if best is None else 1
    loop._save(best is not None)
    return loop


def groups(loop: Loop) -> list[dict[str, Any]]:
    """The optimizers' settings, without parameters."""
    return [{name: value for name, value in g.items() if name != "params"} for g in loop.optimizer.param_groups]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_settings_of_the_optimizer_apply_to_a_resumed_run(world: dict[str, Any], optimizer: str) -> None:
    before = groups(saved(world, optimizer=optimizer, decay_norm_and_bias=False))
    assert groups(workshop.make_loop(world, resume=True)) == before
    new: dict[str, Any] = {"weight_decay": 0.3, "betas": (0.7, 0.8), "eps": 1e-6}
    new |= {"muon_momentum": 0.5, "muon_weight_decay": 0.2} if optimizer == "muon" else {}
    resumed = workshop.make_loop(world, resume=True, **new)
    *muon, decayed, spared = groups(resumed)
    assert (decayed["weight_decay"], decayed["betas"], decayed["eps"]) == (0.3, (0.7, 0.8), 1e-6)
    assert (spared["weight_decay"], spared["betas"]) == (0.0, (0.7, 0.8))  # norms: none before, none now
    assert [(g["momentum"], g["weight_decay"]) for g in muon] == [(0.5, 0.2)] * (optimizer == "muon")
    assert resumed.train_step(1).applied


@pytest.mark.parametrize(("made", "used"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_is_refused_by_name(
    world: dict[str, Any], made: str, used: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(world, optimizer=made)
    world["training"]["pretrain"]["optimizer"] = used
    Path("c.json").write_text(json.dumps(world))
    assert main(["--phase", "pretrain", "--config", "c.json", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: the checkpoint's optimizer state is of {made}, this run uses {used}; set"
        f' training.pretrain.optimizer to "{made}" to go on from it'
    )


def test_other_groups_of_the_optimizer_are_refused(world: dict[str, Any]) -> None:
    saved(world)
    with pytest.raises(ValueError, match=r"does not fit .* decay_embeddings of training\.pretrain the values that it"):
        workshop.make_loop(world, resume=True, decay_norm_and_bias=False)


def test_another_seed_or_batch_is_warned_of(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    saved(world)
    capsys.readouterr()
    workshop.make_loop(world, resume=True)
    assert warnings(capsys) == []
    workshop.make_loop(world, resume=True, seed=43, micro_B=8)
    assert warnings(capsys) == [
        "warning: seed was 42, is now 43: the resumed run is not exact to the bit",
        "warning: [micro_B, accum_steps] was [4, 2], is now [8, 2]: the resumed run is not exact to the bit",
    ]


def test_the_best_loss_is_remembered_without_its_file_where_none_is_kept(world: dict[str, Any]) -> None:
    saved(world, best=0.5)
    ckpt.phase_paths("pretrain").best.unlink()
    assert workshop.make_loop(world, resume=True).state.best_val_loss is None
    resumed = workshop.make_loop(world, resume=True, save_best=False)
    assert (resumed.state.best_val_loss, resumed.state.best_step) == (0.5, 1)


def test_a_best_file_of_an_older_run_is_replaced(world: dict[str, Any]) -> None:
    """A fresh run in its folder is killed after its first step file, before it has a best.pt of its own."""
    saved(world, best=0.5)
    fresh = workshop.make_loop(world)
    fresh._one_step()
    fresh.state.best_val_loss = 0.1
    fresh._save(False)
    resumed = workshop.make_loop(world, resume=True)
    assert resumed.state.step == 1 and resumed.state.best_val_loss is None
    resumed._save(True)
    resumed.state.best_val_loss = 0.2
    resumed._save(False)
    assert workshop.make_loop(world, resume=True).state.best_val_loss == 0.2


def test_another_phase_leaves_its_step_and_nothing_else(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best loss is of other text, and its clock would leave other time than was asked for, or none."""
    saved(world)
    made = ckpt.load_checkpoint(ckpt.phase_paths("pretrain").latest, device="cpu")
    record = {**(made["resume"] or {}), "elapsed_s": 5000.0, "finished_s": 6000.0, "is_finished": True, "best_step": 1}
    ckpt.save_checkpoint(
        "other.pt",
        model_cfg=made["model_cfg"],
        train_cfg=made["train_cfg"],
        model=made["model_state"],
        optimizer=made["optimizer_state"],
        step=1,
        best_val_loss=0.5,
        resume=record,
    )
    best = ckpt.phase_paths("sft").best
    best.parent.mkdir(parents=True)
    shutil.copy("other.pt", best)  # without its file a best loss is forgotten anyway
    capsys.readouterr()
    for phase, spent in (("sft", 0.0), ("pretrain", 5000.0)):
        limit = TimeLimit(deadline=time.time() + 600)
        start = start_phase(phase, world, device="cpu", resume_path="other.pt", no_auto_resume=False, limit=limit)
        assert start.options.minutes == pytest.approx((600 + spent) / 60, abs=5)
    loop = workshop.make_loop(world, "sft")
    state, seconds = loop.saver.restore(ckpt.load_checkpoint("other.pt", device="cpu"))
    assert warnings(capsys) == ["warning: this checkpoint was saved by phase pretrain, this run is sft"]
    assert (state, seconds) == (RunState(step=1, good_step=1, evaluated_step=1), 0.0)
    assert loop.saver.finished_seconds is None and not loop.saver.is_finished
    own = workshop.make_loop(world)
    state, seconds = own.saver.restore(ckpt.load_checkpoint("other.pt", device="cpu"))
    assert seconds == 5000 and state.tokens_seen > 0 and own.saver.finished_seconds == 6000


def test_another_model_is_refused_before_anything_is_said_or_recorded(world: dict[str, Any], capsys: Any) -> None:
    for phase in ("pretrain", "sft"):
        world["training"][phase] |= {"total_steps": 1, "warmup_steps": 0}
    best = run_pretrain(world, device="cpu", quiet=True)["best_path"]
    (record,) = Path("runs").glob("*/resolved_settings.json")
    before = record.read_bytes()
    wider = {**world, "model": {**world["model"], "C": 64}}
    problem = "the checkpoint's model differs from the settings in model.C (checkpoint 32, settings 64)"
    Path("wider.json").write_text(json.dumps(wider))
    assert main(["--phase", "pretrain", "--config", "wider.json", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out == "using device: cpu\n" and said.err == (
        f"error: cannot go on from checkpoints/pretrain/latest.pt: {problem};"
        " use its settings, or start afresh with --no-resume\n"
    )
    assert record.read_bytes() == before  # the settings that are to be used
    with pytest.raises(ValueError, match=rf"{re.escape(problem)}; use the settings that it was trained with$"):
        run_sft(wider, device="cpu", init_model_path=best)
    assert "sft init from" not in capsys.readouterr().out
