"""Too little memory: the same batch in smaller pieces, evaluation too, and advice where one row does not fit."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.loop import Loop
from niels_gpt.train.memory import is_out_of_memory
from niels_gpt.train.microbatches import Microbatches
from niels_gpt.train.run import main
from tests.train import workshop


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


SHORT = {"total_steps": 8, "eval_every": 100, "micro_B": 4, "accum_steps": 2}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> dict[int, str]:
    """The losses of a run with all the memory that it wants."""
    folder = tmp_path_factory.mktemp("roomy")
    workshop.build_caches(folder, tiny_tokenizer)
    config = workshop.overrides(folder, tiny_tokenizer)
    config["model"]["dropout"] = 0.0
    with contextlib.chdir(folder):
        workshop.make_loop(config, **SHORT).run()
    return workshop.steps_logged(folder)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_is_the_same_batch_in_smaller_pieces(
    world: dict[str, Any],
    tmp_path: Path,
    expected: dict[int, str],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    world["model"]["dropout"] = 0.0
    loop = workshop.make_loop(world, **SHORT)
    run_out(loop, 5, 1, error)
    loop.run()
    found = workshop.steps_logged(tmp_path)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on address space as Linux has it")
def test_a_real_limit_on_memory(world: dict[str, Any], tmp_path: Path) -> None:
    """The process may take 100 MB more than it has after its first small step; 512 rows at once need more."""
    world["model"] |= {"dropout": 0.0, "C": 64, "d_ff": 256}
    world["training"]["pretrain"] |= {
        "micro_B": 512,
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
resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, -1))
from niels_gpt.train.run import main
sys.exit(main({["--phase", "pretrain", "--config", "config.json", "--device", "cpu", "--no-resume"]!r}))
"""
    main(["--phase", "pretrain", "--config", "config.json", "--device", "cpu", "--no-resume"])
    free = workshop.steps_logged(tmp_path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=workshop.environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "out of memory with microbatches of 512 rows" in done.stderr
    assert {n: float.fromhex(x) for n, x in workshop.steps_logged(tmp_path).items()} == pytest.approx(
        {n: float.fromhex(x) for n, x in free.items()}, abs=1e-4
    )
