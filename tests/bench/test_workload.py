"""What is measured is the trainer's step; running out of memory is told from everything else."""

from __future__ import annotations

import random
import sys

import psutil
import pytest
import torch

from niels_gpt.bench import workload
from niels_gpt.bench.search import largest_microbatch
from niels_gpt.bench.trial import Result
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import Muon
from niels_gpt.train.step import Stepper
from tests.bench.trials import tiny_trial


@pytest.mark.parametrize("seed", range(20))
def test_an_allocator_with_any_limit_gives_the_largest_microbatch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    rows, limit = rng.randrange(0, 48), rng.randrange(1, 40)
    real, found = GPT.forward, list[Result]()

    def forward(self: GPT, x: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if x.shape[0] > rows and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, x, *args, **options)

    def measure(micro_B: int) -> Result:
        found.append(workload.measure(tiny_trial(micro_B)))
        return found[-1]

    monkeypatch.setattr(GPT, "forward", forward)
    assert largest_microbatch(measure, limit) == min(rows, limit)
    sizes = [result.trial.micro_B for result in found]
    assert len(sizes) == len(set(sizes))
    assert {result.status for result in found if result.trial.micro_B > rows} <= {"oom"}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_the_real_allocator_at_its_limit_is_out_of_memory() -> None:
    import resource

    workload.measure(tiny_trial())  # so that what the first step takes is taken
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, hard))
    try:
        small, large = (workload.measure(tiny_trial(rows)).status for rows in (2, 2**19))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (small, large) == ("ok", "oom")


@pytest.mark.parametrize("message", ["MPS backend has a bug", "invalid allocator alloc", "expected scalar type Float"])
def test_other_errors_are_no_lack_of_memory(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Stepper, number: int) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(RuntimeError, match=message):
        workload.measure(tiny_trial())


def test_the_step_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Stepper] = []
    real = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, number: (built.append(self), real(self, number))[1])
    trial = tiny_trial(
        3,
        activation_checkpointing=True,
        steps_warmup=2,
        steps_measure=3,
        settings={
            "model": {"mlp_type": "gelu"},
            "training": {"native_kernels": False, "pretrain": {"optimizer": "muon", "accum_steps": 2}},
        },
    )
    result = workload.measure(trial)
    assert result.ok and len(result.step_seconds) == 3 and len(built) == 5
    stepper = built[0]
    assert isinstance(stepper.optimizer.optimizers["muon"], Muon)  # type: ignore[union-attr]
    assert stepper.model.activation_checkpointing and stepper.model.arch.mlp_type == "gelu"
    assert (stepper.microbatches.size, stepper.microbatches.count) == (3, 2)
    median = sorted(result.step_seconds)[1]
    assert result.ms_per_step == pytest.approx(1000 * median, abs=0.006)
    assert result.tokens_per_sec == pytest.approx(2 * 3 * 4 / median, rel=1e-3)


def test_types_are_those_under_autocast() -> None:
    types = workload.measure(tiny_trial(amp=True, amp_dtype="bf16")).dtype_summary
    assert types["autocast_enabled"] == "True" and types["embed_param"] == "torch.float32"
    assert {types[name] for name in ("logits", "attn_qkv", "mlp_intermediate")} == {"torch.bfloat16"}


def test_a_step_whose_compiler_fails_is_measured_without_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GPT, backend: str = "inductor") -> None:
        self.compiled = True
        for block in self.blocks:
            block._compiled_call_impl = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no C++ compiler"))

    monkeypatch.setattr(GPT, "compile_blocks", broken)
    result = workload.measure(tiny_trial(settings={"training": {"pretrain": {"compile": True}}}))
    assert result.ok and not result.compiled and "no C++ compiler" in result.message
