"""What goes wrong in the night and is put right: steps that are not finite, and no compiler."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.train.loop import MAX_SKIPPED_IN_A_ROW, Loop
from niels_gpt.train.run import main
from niels_gpt.train.state import StepResult
from niels_gpt.train.step import Stepper
from tests.train import workshop

FATAL = 0.006  # learning rates above it are made to diverge


def state_of(loop: Loop) -> str:
    """Everything a step may change, as text."""
    content = {"model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict()}
    return json.dumps(content, default=lambda t: t.tolist())


def poison_loss(loop: Loop, value: float) -> Callable[[], None]:
    forward = loop.stepper.forward
    loop.stepper.forward = lambda *a, **k: forward(*a, **k) * value
    return lambda: setattr(loop.stepper, "forward", forward)


def poison_microbatch(loop: Loop, value: float) -> Callable[[], None]:
    """Only the second microbatch of the step."""
    forward, calls = loop.stepper.forward, []

    def second(*a: Any, **k: Any) -> torch.Tensor:
        calls.append(1)
        return forward(*a, **k) * (value if len(calls) == 2 else 1.0)

    loop.stepper.forward = second
    return lambda: setattr(loop.stepper, "forward", forward)


def poison_gradient(loop: Loop, value: float) -> Callable[[], None]:
    """One element of one gradient."""
    victim = loop.model.blocks[0].mlp.fc_a.weight
    element = torch.zeros_like(victim)
    element.view(-1)[7] = value
    return victim.register_hook(lambda grad: grad + element).remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("poison", [poison_loss, poison_microbatch, poison_gradient])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_leaves_no_trace(
    world: dict[str, Any], poison: Callable[[Loop, float], Callable[[], None]], value: float, optimizer: str
) -> None:
    loop = workshop.make_loop(world, optimizer=optimizer)
    assert loop.train_step(0).applied
    before = state_of(loop)
    cure = poison(loop, value)
    assert not loop.train_step(1).applied
    cure()
    assert state_of(loop) == before
    assert loop.train_step(2).applied and state_of(loop) != before


def diverging(loop: Loop) -> Loop:
    """From step 7 on, gradients are NaN wherever the learning rate is above FATAL."""
    take = loop.stepper.step

    def step(n: int) -> StepResult:
        rate = loop.optimizer.param_groups[-1]["lr"]
        cure = poison_gradient(loop, math.nan) if n >= 7 and rate > FATAL else None
        result = take(n)
        if cure is not None:
            cure()
        return result

    loop.stepper.step = step  # type: ignore[method-assign]
    return loop


def test_a_run_that_diverges_goes_back_and_on_with_a_lower_learning_rate(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"total_steps": 24, "warmup_steps": 0, "min_lr": 0.01, "ckpt_every": 5, "eval_every": 100}
    result = diverging(workshop.make_loop(world, **schedule)).run()
    said = capsys.readouterr().err
    assert said.count("back to step_0000005.pt (step 5) with 0.5 x the learning rate") == 1
    assert result.state.step == 24 and result.state.skipped_steps == MAX_SKIPPED_IN_A_ROW
    assert result.state.lr_factor == 0.5 and result.state.rollbacks == 0
    straight, sha = workshop.steps_logged(tmp_path), workshop.weights_sha(result.latest_path)
    record = ckpt.load_checkpoint(result.latest_path, device="cpu")["resume"]
    assert record is not None and record["lr_factor"] == 0.5

    # Killed between any two steps, also amid the skipped ones and right after the rollback, it takes the same course.
    for kill_after in (9, 12, 17):
        for path in [*tmp_path.glob("checkpoints/*/*.pt"), *tmp_path.glob("runs/*/metrics.jsonl")]:
            path.unlink()
        loop = diverging(workshop.make_loop(world))
        loop.reporter.start(loop)
        for _ in range(kill_after):
            loop._one_step()
        resumed = diverging(workshop.make_loop(world, resume=True)).run()
        assert workshop.weights_sha(resumed.latest_path) == sha, kill_after
        assert workshop.steps_logged(tmp_path) == straight, kill_after


def test_a_signal_amid_skipped_steps_changes_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    """It saves weights that are not worth going back to; the resumed run goes back to where the other one does."""
    schedule = {"total_steps": 24, "warmup_steps": 0, "min_lr": 0.01, "ckpt_every": 5, "eval_every": 100}
    sha = workshop.weights_sha(diverging(workshop.make_loop(world, **schedule)).run().latest_path)
    for path in tmp_path.glob("checkpoints/*/*.pt"):
        path.unlink()
    loop = diverging(workshop.make_loop(world))
    for _ in range(9):
        loop._one_step()
    assert loop.state.skipped_in_a_row == 2
    loop._save(False)
    assert workshop.weights_sha(diverging(workshop.make_loop(world, resume=True)).run().latest_path) == sha


def test_it_gives_up_in_the_end(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(world))
    backward = Stepper._backward

    def poisoned(stepper: Stepper, n: int, *rest: Any) -> float:
        return backward(stepper, n, *rest) * (math.nan if n >= 6 else 1)

    monkeypatch.setattr(Stepper, "_backward", poisoned)
    assert main(["--phase", "pretrain", "--config", "config.json", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.count("back to step_0000005.pt") == 3
    assert "error: step 11: losses or gradients are not finite, also after 3 rollbacks" in said.splitlines()[-1]
    assert ckpt.load_checkpoint("checkpoints/pretrain/latest.pt", device="cpu")["step"] in (5, 8, 10)


def test_weights_that_are_no_numbers_are_not_saved_but_gone_back_from(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    loop = workshop.make_loop(world, eval_every=100)
    for _ in range(5):
        loop._one_step()
    with torch.no_grad():
        loop.model.ln_f.weight[0] = math.nan
    loop.state.step = 8
    loop._save(False, on_schedule=True)
    assert loop.state.step == 4 and "not saved: ln_f.weight holds NaN" in capsys.readouterr().err
    assert loop.run().state.step == 12


def test_the_scaler_of_fp16_may_look_for_its_scale(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    loop = workshop.make_loop(world)
    loop.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    loop.model.ln_f.weight.register_hook(lambda grad: grad.half().float())  # overflows until the scale has come down
    skipped = 0
    while not (result := loop.train_step(skipped)).applied:
        assert result.rescaled and not loop._note_skips(result)
        skipped += 1
    assert skipped > MAX_SKIPPED_IN_A_ROW and loop.state.skipped_steps == 0 and capsys.readouterr().err == ""
    poison_loss(loop, math.nan)
    assert not loop.train_step(0).rescaled  # a loss that is not finite is no matter of scale


# --- the compiler


@pytest.mark.soak
def test_training_goes_on_without_a_compiler(world: dict[str, Any], tmp_path: Path) -> None:
    world["training"]["pretrain"] |= {"compile": True, "total_steps": 5}
    (tmp_path / "config.json").write_text(json.dumps(world))
    environment = {**workshop.environment(), "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "none")}
    done = subprocess.run(
        workshop.command("--phase", "pretrain", "--config", "config.json", "--device", "cpu"),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: torch.compile")]
    assert "nowhere" in warning and "Set training.pretrain.compile to false" in warning
    compiled = workshop.steps_logged(tmp_path)
    latest = Path("checkpoints/pretrain/latest.pt")
    record = ckpt.load_checkpoint(latest, device="cpu")["resume"]
    assert record is not None and record["compiled"] is False
    sha = workshop.weights_sha(latest)
    (tmp_path / "runs").rename(tmp_path / "other")
    eager = workshop.make_loop(world, compile=False).run()
    assert workshop.steps_logged(tmp_path) == compiled and workshop.weights_sha(eager.latest_path) == sha


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_whatever_the_compiler_raises(
    world: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_(block: Any, **_: Any) -> Any:
        def forward(*a: Any, **k: Any) -> torch.Tensor:
            if where == "forward":
                raise ImportError("no module named triton") from OSError("libtriton.so: not found")
            h: torch.Tensor = block(*a, **k)
            h.register_hook(lambda grad: exec("raise AssertionError('lowering failed')"))
            return h

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    loop = workshop.make_loop(world, compile=True)
    assert set(loop.model.state_dict()) == set(workshop.make_loop(world, compile=False).model.state_dict())
    assert loop.train_step(0) == workshop.make_loop(world, compile=False).train_step(0)
    assert not loop.stepper.compiled and capsys.readouterr().err.count("torch.compile failed") == 1
