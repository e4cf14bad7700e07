"""One model on several processes: DDP, which copies it, or FSDP2, which shards it. Sums of gradients, never means.

The loss is divided by the number of targets of all processes, so the sum over processes is the gradient of the mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from niels_gpt.model.gpt import GPT
from niels_gpt.optim import Optimizer, OptimizerGroup, sharded_like, whole
from niels_gpt.train.distributed import World, exchanging, mapped

if torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel


def replicated(model: nn.Module, world: World) -> nn.Module:
    """`model` behind DDP: a backward pass sums its gradients over the processes, bucket by bucket as they come."""
    if world.size == 1:
        return model
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # Nothing is unused. The setting keeps DDP from regrouping its buckets after the first step, and with it the order
    # of the sums: with three processes or more, a resumed run would differ in the last bits.
    parallel = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    parallel.register_comm_hook(None, _summed)
    return parallel


def _summed(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations as objects
    """DDP's communication hook: the sum. Its own hook takes the mean, which only rounds in worlds of 3, 5, 6, ..."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def sharded(model: GPT) -> None:
    """Keep of every parameter only this process's rows (FSDP2); a block's are gathered while it computes."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


@contextmanager
def backward_pass(forward: nn.Module | Callable[..., Tensor], model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one microbatch: gradients are exchanged with the last of a step only."""
    if not (torch.distributed.is_available() and dist.is_initialized()):
        yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with exchanging(), forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext():
        yield


def whole_state(state: Any, world: World) -> Any:
    """Weights or optimizer state as one process has them, on the main process's CPU; elsewhere the tensors are None.

    Every process must call it: shards are gathered one tensor at a time.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = whole(value.detach())
        return full.cpu() if world.is_main else None

    return state if world.size == 1 else mapped(state, gathered)


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
