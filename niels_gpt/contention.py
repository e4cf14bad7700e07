"""Beside other programs: while they want the cores too, OpenMP's threads do not wait for each other by spinning.

Between two pieces of work the threads wait for each other. Spinning is the quickest way where each has a core; beside
a busy program it is the slowest, as the one that spins keeps the core that the one it waits for would need. GNU's
OpenMP, which PyTorch has on Linux, hardly spins once its threads outnumber the cores (`gomp_managed_threads` in
libgomp's config/linux/wait.h), but it counts the threads of its own process only. So while other programs are busy,
idle pools of threads are kept, which make them outnumber the cores. No result depends on it.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from niels_gpt.device import usable_cores

INTERVAL = 1.0  # seconds between two looks
CONTENDED, FREE = 0.25, 0.10  # seconds that threads waited for a core, per second; on a quiet machine 0.02, else 0.7


def seconds_waited() -> float | None:
    """How long all threads of this process have been ready to run without a core so far; None where nothing says it."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9
    except (OSError, ValueError, IndexError):  # another system, or a thread that has just ended
        return None


class Pool:
    """A pool of OpenMP's threads that sleeps, besides the one that works, until it is closed."""

    def __init__(self) -> None:
        self._end, made = threading.Event(), threading.Event()

        def live() -> None:
            torch.ones(1 << 20).add_(1)  # enough for every thread to take part
            made.set()
            self._end.wait()

        self._thread = threading.Thread(target=live, name="idle OpenMP pool", daemon=True)
        self._thread.start()
        made.wait()

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Watch:
    """Looks now and then whether this process has the cores that its threads would use, and acts on it."""

    def __init__(
        self, waited: Callable[[], float | None] = seconds_waited, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._waited, self._now = waited, now
        self._before: tuple[float, float] | None = None  # when, and what `waited` said
        self.pools: list[Pool] = []

    def look(self) -> None:
        """Call it often; it takes a look once a second."""
        now = self._now()
        if self._before is not None and now - self._before[0] < INTERVAL:
            return
        waited, before = self._waited(), self._before
        self._before = None if waited is None else (now, waited)
        if waited is None or before is None:
            return
        share = (waited - before[1]) / (now - before[0])
        if share > CONTENDED and not self.pools:
            self.pools = [Pool() for _ in range(pools_needed(torch.get_num_threads(), usable_cores()))]
        elif share < FREE:
            self.close()

    def close(self) -> None:
        while self.pools:
            self.pools.pop().close()


def pools_needed(threads: int, cores: int) -> int:
    """Pools, each of `threads` - 1 threads beside the one that made it, to outnumber the cores; 0 if nothing waits."""
    return math.ceil((cores - threads + 1) / (threads - 1)) if 1 < threads <= cores else 0


_WATCH = Watch()


def look() -> None:
    """To be called wherever PyTorch computes for long: at every step, batch of an evaluation, prompt."""
    if sys.platform == "linux" and torch.get_num_threads() > 1:
        _WATCH.look()
