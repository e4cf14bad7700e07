"""The processes of one run: which of them this is, and how they agree. One process alone is a `World()`.

`torchrun --nproc-per-node N -m train.run ...` starts N processes, each with its number in the environment. Process 0,
the main one, prints and writes; whatever decides a run's course (a stop signal, the clock, a checkpoint that is read)
is agreed on, so that all take the same turn at the same step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

if torch.distributed.is_available():  # not in every build of PyTorch; a single process does without
    import torch.distributed as dist

T = TypeVar("T")
LONGEST_WAIT = timedelta(minutes=30)  # in one exchange; a process that shows no life at all is noticed by `pulse`


class LostProcess(RuntimeError):
    """Another process of this run has ended or hangs, so this one ends too."""


class MainFailed(RuntimeError):
    """The main process could not go on, and has said why."""


@dataclass(frozen=True)
class World:
    """This process among `size` of them. All must call the methods that exchange something, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes: whole numbers exactly (below 2**53), NaN if one of them has NaN."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with exchanging():
            dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The largest of the processes' values: a stop signal or a problem that one of them has seen."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64)
        with exchanging():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, in their order, on each of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with exchanging():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main process, on all of them; it is not called elsewhere.

        Tensors anywhere in dicts, lists and tuples travel as they are. If `make` raises, so does every process.
        """
        if self.size == 1:
            return make()
        tensors: list[Tensor] = []
        value, problem = None, None
        if self.is_main:
            try:
                value = make()
            except Exception as error:  # whatever it is, the others must not wait for a value that will not come
                problem = error
        message = [_without(value, tensors), None if problem is None else f"{type(problem).__name__}: {problem}"]
        with exchanging():
            dist.broadcast_object_list(message, device=torch.device("cpu"))
            if problem is not None:
                raise problem
            if message[1] is not None:
                raise MainFailed(f"process 0 failed: {message[1]}")
            if not self.is_main:
                value = _with_room(message[0], tensors)
            for tensor in tensors:
                dist.broadcast(tensor, 0)
        return cast(T, value)

    def on_main(self, do: Callable[[], object]) -> None:
        """Let the main process do something while the others wait for it; if it raises, every process does."""
        if self.size == 1:
            do()
        else:
            self.from_main(lambda: do() and None)

    def check_same(self, **values: object) -> None:
        """ValueError if a process was started with other values, such as settings or data."""
        for name, value in values.items():
            for rank, other in enumerate(self.gather(value)):
                if other != value:
                    raise ValueError(
                        f"{name} differs between the processes of this run: {value!r:.200} here (process {self.rank}), "
                        f"{other!r:.200} on process {rank}; start all of them with the same files and versions"
                    )


ALONE = World()


@dataclass(frozen=True)
class _Hole:
    """Where a tensor was taken out of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with `leaf` applied to whatever is in its dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: mapped(item, leaf) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, leaf) for item in value)
    return leaf(value)


def _without(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with a hole for each tensor, which go to `tensors` in order."""

    def lift(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        tensors.append(item.detach().cpu().contiguous())
        return _Hole(tuple(item.shape), item.dtype)

    return mapped(value, lift)


def _with_room(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with an empty tensor in each hole; the same tensors go to `tensors` in order."""

    def fill(item: Any) -> Any:
        if not isinstance(item, _Hole):
            return item
        tensors.append(torch.empty(item.shape, dtype=item.dtype))
        return tensors[-1]

    return mapped(value, fill)


@contextmanager
def exchanging() -> Iterator[None]:
    """Within it, the error of an exchange that another process has left becomes LostProcess."""
    try:
        yield
    except RuntimeError as error:
        if _is_lost_connection(error):
            raise LostProcess(LOST) from error
        raise


LOST = (
    "another process of this run has ended or does not answer, so this one ends as well; "
    "the run can go on from its last checkpoint"
)


def _is_lost_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "connection", "nccl", "timed out", "socket"))


def is_torchrun() -> bool:
    """True in one of several processes that torchrun (or another launcher with its variables) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes that torchrun started together, connected while the block runs; alone, `World()` without ado.

    CPUs talk through gloo; with CUDA each local process takes the GPU of its number and gradients go through NCCL.
    ValueError when `device` cannot be shared like this.
    """
    if not is_torchrun():
        yield ALONE
        return
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    _check_device(device, world.local_rank)
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    yield world
    dist.destroy_process_group()  # not after an error: the others may not be there to say goodbye to


def _check_device(device: str, local_rank: int) -> None:
    if not torch.distributed.is_available():
        raise ValueError("this PyTorch is built without torch.distributed; start one process, without torchrun")
    if device == "mps":
        raise ValueError("several processes cannot share a Metal GPU; start one process, or give --device cpu")
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} CUDA GPU(s) and torchrun started at least {local_rank + 1} "
            f"processes; give --nproc-per-node {torch.cuda.device_count()}"
        )
