"""Every process of a run shows each second that it lives; when one falls silent, the others end the job.

A process that is killed closes its connections, which gloo notices at once. One that hangs (stopped, swapped out, lost
with its machine) would hold the others up until the exchange they wait in times out, which must take longer than the
longest save. A thread's pulse tells the two apart: it beats on through saves, evaluations and compilation.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch

from niels_gpt.train.distributed import LOST, World

if torch.distributed.is_available():
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT = 1.0  # seconds between two signs of life
EXIT_CODE = 1
LEFT = 1 << 60  # taken off a count of beats, it makes it negative for good

_watches = 0  # of this process so far: each has keys of its own, the same on all processes


@contextmanager
def watching(world: World, silence: float) -> Iterator[None]:
    """While the block runs, end this process when another has been silent for `silence` seconds.

    A silent process of this machine is killed with it: torchrun would wait half a minute for it to heed a signal.
    """
    global _watches
    if world.size == 1:
        yield
        return
    _watches += 1
    pulse = _Pulse(world, silence, _watches)
    pulse.start()
    in_order = False
    try:
        yield
        in_order = True
    finally:
        pulse.stop(in_order)


class _Pulse:
    """One thread beats and listens, in the key-value store of the job; another watches it and whom it has heard."""

    def __init__(self, world: World, silence: float, watch: int) -> None:
        self.world, self.silence = world, silence
        here = psutil.Process()
        self.processes = world.gather((socket.gethostname(), here.pid, here.create_time()))
        # A restarted job finds the counts of the one before it in torchrun's store; process 0 tells them apart.
        self.prefix = "/".join(map(str, ("niels-gpt", "pulse", *self.processes[0], watch)))
        now = time.monotonic()
        self.reached = now  # when the store answered last
        self.heard = {rank: (-1, now) for rank in range(world.size) if rank != world.rank}  # count of beats, when
        self.in_order = False
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, in_order: bool) -> None:
        """in_order: this process is done, and the others need not hear from it any more."""
        self.in_order = in_order
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT)

    def _beat(self) -> None:
        # A connection of its own: the one of the process group is held while something waits on it.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = None
        while True:
            try:
                wait = timedelta(seconds=self.silence)
                store = store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
                store.add(self._key(self.world.rank), 1)
                counts = {rank: store.add(self._key(rank), 0) for rank in self.heard}
                self.reached = now = time.monotonic()
                for rank, count in counts.items():
                    if count < 0 or count != self.heard[rank][0]:
                        self.heard[rank] = (count, now)
            except (RuntimeError, OSError):  # torch's own DistError is a RuntimeError
                store = None
            if self._stopped.wait(BEAT):
                break
        if store is not None and self.in_order:
            with contextlib.suppress(RuntimeError, OSError):
                store.add(self._key(self.world.rank), -LEFT)

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT):
            now = time.monotonic()
            if now - self.reached > self.silence:
                self._end("torchrun, or the machine that it runs on, does not answer", [])
            silent = [rank for rank, (_, at) in self.heard.items() if now - at > self.silence]
            if silent:
                names = ", ".join(map(str, silent))
                self._end(f"process {names} of this run has shown no sign of life for {self.silence:g} s", silent)

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"

    def _end(self, why: str, silent: list[int]) -> None:
        """Kill the silent processes of this machine, and leave at once: the main thread may be waiting for ever."""
        print(f"error: process {self.world.rank}: {why}; {LOST}", file=sys.stderr, flush=True)
        for rank in silent:
            host, pid, created = self.processes[rank]
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if host == socket.gethostname() and process.create_time() == created:
                    process.kill()
        os._exit(EXIT_CODE)
