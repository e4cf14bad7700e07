"""What goes wrong in the night and is put right: steps that are not finite, too little memory, no compiler."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt.train.loop import MAX_SKIPPED_IN_A_ROW, Loop
from niels_gpt.train.memory import is_out_of_memory
from niels_gpt.train.microbatches import Microbatches
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


def losses(folder: Path) -> dict[int, str]:
    return workshop.steps_logged(folder, "pretrain")


def test_a_run_that_diverges_goes_back_and_on_with_a_lower_learning_rate(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"total_steps": 24, "warmup_steps": 0, "min_lr": 0.01, "ckpt_every": 5, "eval_every": 100}
    result = diverging(workshop.make_loop(world, **schedule)).run()
    said = capsys.readouterr().err
    assert said.count("back to step_0000005.pt (step 5) with 0.5 x the learning rate") == 1
    assert result.state.step == 24 and result.state.skipped_steps == MAX_SKIPPED_IN_A_ROW
    assert result.state.lr_factor == 0.5 and result.state.rollbacks == 0
    straight, sha = losses(tmp_path), workshop.weights_sha(result.latest_path)
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
        assert losses(tmp_path) == straight, kill_after


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


# --- memory


def run_out(loop: Loop, at: int, most_rows: int, error: BaseException) -> None:
    """From step `at` on, more rows than `most_rows` at once do not fit: halfway through a microbatch's work."""
    backward = loop.stepper._backward

    def limited(step: int, m: int, batch: Any, *rest: Any) -> float:
        nats = backward(step, m, batch, *rest)  # its gradients are there, and must go
        if step >= at and len(batch.x) > most_rows:
            raise error
        return nats

    loop.stepper._backward = limited  # type: ignore[method-assign]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    MemoryError("Unable to allocate 1 GiB"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_is_the_same_batch_in_smaller_pieces(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    world["model"]["dropout"] = 0.0
    workshop.make_loop(world, eval_every=100, micro_B=4, accum_steps=2).run()
    expected = losses(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "other")
    loop = workshop.make_loop(world)
    run_out(loop, 5, 1, error)
    loop.run()
    found = losses(tmp_path)
    assert {n: float.fromhex(x) for n, x in found.items()} == pytest.approx(
        {n: float.fromhex(x) for n, x in expected.items()}, abs=1e-4
    )
    assert [found[n] for n in range(1, 6)] == [expected[n] for n in range(1, 6)]
    said = capsys.readouterr().err
    assert said.count("warning:") == 2  # 4 -> 2 -> 1
    assert "Set training.pretrain.micro_B to 1 and accum_steps to 8 to start this way" in said
    assert workshop.make_loop(world, resume=True).stepper.microbatches == Microbatches(1, 8)  # does not try again
    assert workshop.make_loop(world, resume=True, micro_B=8, accum_steps=1).stepper.microbatches == Microbatches(8, 1)


def test_one_row_that_does_not_fit_is_an_error_with_advice(world: dict[str, Any]) -> None:
    loop = workshop.make_loop(world)
    run_out(loop, 2, 0, ERRORS[1])
    with pytest.raises(ValueError, match=r"step 3: out of memory .* 1 rows.*micro_B.* accum_steps .* model\.T"):
        loop.run()


def test_evaluation_makes_do_with_less_memory(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    loop = workshop.make_loop(world, micro_B_eval=6)
    loop.evaluate()
    expected = loop.last_evals
    forward = loop.model.forward

    def limited(x: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
        if len(x) > 2:
            raise ERRORS[0]
        return forward(x, *a, **k)

    loop.model.forward = limited  # type: ignore[method-assign]
    loop.evaluate()
    assert {n: r.tokens for n, r in loop.last_evals.items()} == {n: r.tokens for n, r in expected.items()}
    assert [r.loss for r in loop.last_evals.values()] == pytest.approx([r.loss for r in expected.values()], abs=1e-5)
    said = capsys.readouterr().err
    assert said.count("warning:") == 2 and "Set training.pretrain.micro_B_eval to 1 to start this way" in said
    loop.model.forward = lambda *a, **k: (_ for _ in ()).throw(ERRORS[0])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="evaluating a single row"):
        loop.evaluate()


def test_other_errors_are_not_taken_for_memory() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError()):
        assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("cut", "smaller"),
    [
        (Microbatches(8, 1), Microbatches(4, 2)),
        (Microbatches(5, 2), Microbatches(2, 5)),
        (Microbatches(7, 1), Microbatches(1, 7)),
        (Microbatches(4, 2, 1, 2), Microbatches(2, 4, 1, 2)),
        (Microbatches(3, 2, 0, 2), Microbatches(1, 6, 0, 2)),
        (Microbatches(1, 8), None),
    ],
)
def test_smaller_microbatches_are_the_same_rows(cut: Microbatches, smaller: Microbatches | None) -> None:
    assert cut.smaller() == smaller
    if smaller is not None:
        rows = [[n for _, first in c.of_step(3) for n in range(first, first + c.size)] for c in (cut, smaller)]
        assert rows[0] == rows[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on address space as Linux has it")
def test_a_real_limit_on_memory(world: dict[str, Any], tmp_path: Path) -> None:
    """The process may take 200 MB more than it has after its first small step; 1024 rows at once need more."""
    world["model"] |= {"dropout": 0.0, "C": 64, "d_ff": 256}
    world["training"]["pretrain"] |= {
        "micro_B": 1024,
        "accum_steps": 1,
        "total_steps": 2,
        "warmup_steps": 1,
        "eval_steps": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(world))
    script = f"""
import json, resource, sys
from tests.train import workshop
config = json.load(open("config.json"))
small = json.loads(json.dumps(config))
loop = workshop.make_loop(small, micro_B=1)
loop.train_step(0), loop.evaluate()
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 200_000_000, -1))
from niels_gpt.train.run import main
sys.exit(main({["--phase", "pretrain", "--config", "config.json", "--device", "cpu", "--no-resume"]!r}))
"""
    main(["--phase", "pretrain", "--config", "config.json", "--device", "cpu", "--no-resume"])
    free = losses(tmp_path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=workshop.environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with microbatches of 1024 rows" in done.stderr
    assert {n: float.fromhex(x) for n, x in losses(tmp_path).items()} == pytest.approx(
        {n: float.fromhex(x) for n, x in free.items()}, abs=1e-4
    )


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
    compiled = losses(tmp_path)
    latest = Path("checkpoints/pretrain/latest.pt")
    record = ckpt.load_checkpoint(latest, device="cpu")["resume"]
    assert record is not None and record["compiled"] is False
    sha = workshop.weights_sha(latest)
    (tmp_path / "runs").rename(tmp_path / "other")
    eager = workshop.make_loop(world, compile=False).run()
    assert losses(tmp_path) == compiled and workshop.weights_sha(eager.latest_path) == sha


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
