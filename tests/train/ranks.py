"""What each process does in `test_distributed`: `torchrun -m tests.train.ranks CASES.json`, each case in its folder.

One start of PyTorch serves all cases; each writes `result.json` of what cannot be seen in its checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from niels_gpt.batching import Batch
from niels_gpt.command import Interrupted
from niels_gpt.train.distributed import World, joined
from niels_gpt.train.loop import Loop, train
from niels_gpt.train.pretrain import pretrain_job, run_pretrain
from niels_gpt.train.report import reporter_for
from niels_gpt.train.start import start_phase


def run(world: World, config: dict[str, Any], resume: str | None) -> object:
    """The whole phase, as train.run does it."""
    result = run_pretrain(config, device="cpu", resume_path=resume, quiet=True, world=world)
    return {key: value for key, value in result.items() if isinstance(value, (int, float))}


def stop(world: World, config: dict[str, Any], resume: str | None) -> object:
    """Process 1 gets a signal while it takes step 6."""
    try:
        train_until(6, lambda: world.rank == 1 and signal.raise_signal(signal.SIGTERM), world, config)
    except Interrupted as said:
        return world.gather(str(said).partition(";")[0])
    return None


def hang(world: World, config: dict[str, Any], resume: str | None) -> object:
    """Process 0 hangs in step 14, which ends the job; so this must be the last case."""
    Path(f"pid{world.rank}").write_text(str(os.getpid()), encoding="utf-8")
    train_until(14, lambda: world.rank == 0 and os.kill(os.getpid(), signal.SIGSTOP), world, config)
    return None


def train_until(step: int, then: Callable[[], object], world: World, config: dict[str, Any]) -> None:
    """Train, and do something while the batch of a step is made."""
    start = start_phase("pretrain", config, device="cpu", resume_path=None, no_auto_resume=True, world=world)
    job = pretrain_job(start)

    def batch(first: int, rows: int) -> Batch:
        if first // (start.options.micro_B * start.options.accum_steps) == step - 1:
            then()
        return job.batch(first, rows)

    reporter = reporter_for(world, "pretrain", start.resolved.run_id, quiet=True)
    train(replace(job, batch=batch), device="cpu", reporter=reporter)


def poison(world: World, config: dict[str, Any], resume: str | None) -> object:
    """Steps that only process 1 sees go wrong: none may change anything anywhere, and the next one works."""
    start = start_phase("pretrain", config, device="cpu", resume_path=None, no_auto_resume=True, world=world)
    reporter = reporter_for(world, "pretrain", start.resolved.run_id, quiet=True)
    loop = Loop(pretrain_job(start), device="cpu", reporter=reporter, resume=None, init=None)
    applied = [loop.train_step(0).applied]
    before = snapshot(loop)
    total = torch.nn.utils.get_total_norm
    for number, how in enumerate(("gradient", "loss", "norm", "nothing"), start=1):
        hooks = []
        if world.rank == 1 and how == "gradient":
            victim = loop.model.blocks[0].mlp.fc_a.weight
            hooks.append(victim.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf)))
        elif world.rank == 1 and how == "loss":
            hooks.append(loop.model.register_forward_hook(lambda model, inputs, loss: loss * math.nan))
        elif world.rank == 1 and how == "norm":
            torch.nn.utils.get_total_norm = lambda *args, **kwargs: total(*args, **kwargs) * math.nan
        applied.append(loop.train_step(number).applied)
        torch.nn.utils.get_total_norm = total
        for hook in hooks:
            hook.remove()
        if how != "nothing":
            assert snapshot(loop) == before, f"process {world.rank}: a poisoned {how} left a trace"
    assert snapshot(loop) != before
    return world.gather(applied)


def snapshot(loop: Loop) -> str:
    """Weights and moments as this process holds them."""
    return json.dumps((loop.model.state_dict(), loop.optimizer.state_dict()), default=lambda t: t.tolist())


def metric(world: World, config: dict[str, Any], resume: str | None) -> object:
    """Losses of one evaluation, by every process."""
    start = start_phase("pretrain", config, device="cpu", resume_path=resume, no_auto_resume=True, world=world)
    reporter = reporter_for(world, "pretrain", start.resolved.run_id, quiet=True)
    loop = Loop(pretrain_job(start), device="cpu", reporter=reporter, resume=start.resume, init=None)
    loop.evaluate()
    return world.gather({name: [result.nats.hex(), result.tokens] for name, result in loop.last_evals.items()})


def scarce(world: World, config: dict[str, Any], resume: str | None) -> object:
    """Memory that lasts for two rows, in process 1 only: all make do with microbatches of two."""
    start = start_phase("pretrain", config, device="cpu", resume_path=None, no_auto_resume=True, world=world)
    reporter = reporter_for(world, "pretrain", start.resolved.run_id, quiet=True)
    loop = Loop(pretrain_job(start), device="cpu", reporter=reporter, resume=None, init=None)

    def refuse(model: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    if world.rank == 1:
        loop.model.register_forward_pre_hook(refuse)
    losses = [loop.train_step(number).loss for number in range(3)]
    loop.evaluate()
    cut = loop.stepper.microbatches
    return world.gather([losses, loop.last_evals["primer"].loss, cut.size, cut.count, loop.evaluation.most_rows])


def refusals(world: World, config: dict[str, Any], resume: str | None) -> object:
    """What each process says when something is wrong on one of them."""

    def fail() -> None:
        raise ValueError("the disk has gone")

    said = []
    for attempt in (lambda: world.from_main(fail), lambda: world.check_same(data=world.rank)):
        try:
            attempt()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return world.gather(said)


ACTIONS = {
    "run": run,
    "stop": stop,
    "hang": hang,
    "poison": poison,
    "scarce": scarce,
    "metric": metric,
    "refusals": refusals,
}


def main(path: str) -> None:
    with joined("cpu") as world:
        for case in json.loads(Path(path).read_text(encoding="utf-8")):
            folder = Path(case["folder"])
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            result = ACTIONS[case["action"]](world, case["config"], case.get("resume"))
            if world.is_main:
                Path("result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
