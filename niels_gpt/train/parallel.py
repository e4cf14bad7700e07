"""One model on several processes: DDP, which copies it, or FSDP2, which shards it. Sums of gradients, never means.

The loss is divided by the number of targets of all processes, so the sum over processes is the gradient of the mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from niels_gpt.device import Precision
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import Optimizer, OptimizerGroup, sharded_like, whole
from niels_gpt.train.distributed import World, exchanging, mapped

if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel


def replicated(model: Callable[..., Tensor], world: World) -> Callable[..., Tensor]:
    """`model` behind DDP: a backward pass sums its gradients over the processes, bucket by bucket as they come."""
    if world.size == 1:
        return model
    assert isinstance(model, nn.Module)
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    unsynced: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    parallel = DistributedDataParallel(model, **unsynced)  # the buffers are rotation tables, the same everywhere
    parallel.register_comm_hook(None, _summed)
    return parallel


def _summed(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations as objects
    """DDP's communication hook: the sum. Its own hook takes the mean, which only rounds in worlds of 3, 5, 6, ..."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def shard(model: GPT, precision: Precision) -> None:
    """Keep of every parameter only this process's rows (FSDP2); a block's are gathered while it computes."""
    if precision.needs_scaler:
        raise ValueError("parallel=fsdp works in fp32 and bf16, not in fp16; set amp_dtype to bf16, or parallel to ddp")
    from torch.distributed.fsdp import FSDPModule, fully_shard  # takes a second

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def backward_pass(forward: Callable[..., Tensor], model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one microbatch: gradients are exchanged with the last of a step only."""
    if not (torch.distributed.is_available() and dist.is_initialized()):
        yield
        return
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    holds_back = isinstance(forward, DistributedDataParallel) and not last
    with exchanging(), forward.no_sync() if holds_back else nullcontext():  # type: ignore[attr-defined]
        yield


def settle(model: nn.Module) -> None:
    """After an evaluation: give back what FSDP keeps gathered until a backward pass, which does not come."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def load_weights(model: nn.Module, whole_model: nn.Module) -> None:
    """Copy all parameters of one model into another of the same shape, which may be sharded."""
    with torch.no_grad():
        for p, values in zip(model.parameters(), whole_model.parameters(), strict=True):
            p.copy_(sharded_like(p, values.to(p.device)))


def whole_state(state: Any, world: World) -> Any:
    """Weights or optimizer state as one process alone has them; where they are sharded, on the main process only.

    Every process must call it: shards are gathered one tensor at a time.
    """

    known: dict[int, Tensor | None] = {}  # a tied weight is gathered once, and stays one

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            full = whole(value.detach())
            known[id(value)] = full.cpu() if world.is_main else None
        return known[id(value)]

    return state if world.size == 1 else mapped(state, gathered)


def whole_model(model: GPT, world: World) -> GPT | None:
    """On the main process the model, or a copy of it that is in one piece; None elsewhere. All must call it."""
    if not is_sharded(model):
        return model if world.is_main else None
    state = whole_state(model.state_dict(keep_vars=True), world)
    if not world.is_main:
        return None
    copy = GPT(model.cfg, model.arch)
    copy.load_state_dict(state)
    return copy.to(next(model.parameters()).device)


def as_sharded(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Whole optimizer state, ready to be loaded into the optimizer of a model that may be sharded."""
    if isinstance(optimizer, OptimizerGroup):
        parts = optimizer.optimizers
        return {name: as_sharded(parts[name], part) if name in parts else part for name, part in state.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(index: int, value: Any) -> Any:
        is_like = isinstance(value, Tensor) and index < len(params) and value.shape == params[index].shape
        return sharded_like(params[index], value.to(params[index].device)) if is_like else value

    return {
        **state,
        "state": {i: {key: shard(i, value) for key, value in entry.items()} for i, entry in state["state"].items()},
    }
