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

_watches = 0  # of this process so far: each writes under keys of its own, the same on all processes


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
    pulse = _Pulse(world, silence, f"niels-gpt/pulse/{_watches}")
    pulse.start()
    try:
        yield
    finally:
        pulse.stop()


class _Pulse:
    """Writes this process's beats to the job's key-value store, and reads those of the others."""

    def __init__(self, world: World, silence: float, prefix: str) -> None:
        self.world, self.silence = world, silence
        self.prefix = prefix
        here = psutil.Process()
        self.neighbours = world.gather((socket.gethostname(), here.pid, here.create_time()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """This process leaves in good order, so the others need not hear from it any more."""
        self._stop.set()
        self._thread.join(timeout=2 * BEAT)

    def _run(self) -> None:
        # A connection of its own: the one of the process group is held while something waits on it.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        heard = {rank: (-1, time.monotonic()) for rank in range(self.world.size) if rank != self.world.rank}
        store, reached, beat = None, time.monotonic(), 0
        while not self._stop.wait(BEAT if beat else 0):
            try:
                wait = timedelta(seconds=self.silence)
                store = store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
                beat = store.add(self._key(self.world.rank), 1)
                counts = {rank: store.add(self._key(rank), 0) for rank in heard}
            except (RuntimeError, OSError):  # torch's own DistError is a RuntimeError
                store, beat = None, 1
                if time.monotonic() - reached > self.silence:
                    self._end("the process that torchrun runs in does not answer")
                continue
            reached = now = time.monotonic()
            for rank, count in counts.items():
                if count < 0 or count != heard[rank][0]:
                    heard[rank] = (count, now)
            silent = [rank for rank, (_, at) in heard.items() if now - at > self.silence]
            if silent:
                names = ", ".join(map(str, silent))
                self._end(f"process {names} of this run has shown no sign of life for {self.silence:g} s", silent)
        if store is not None:
            with contextlib.suppress(RuntimeError, OSError):
                store.add(self._key(self.world.rank), -LEFT)

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"

    def _end(self, why: str, silent: list[int] | None = None) -> None:
        """Kill the silent processes of this machine, and leave at once: the main thread may be waiting for ever."""
        print(f"error: process {self.world.rank}: {why}; {LOST}", file=sys.stderr, flush=True)
        for rank in silent or ():
            host, pid, created = self.neighbours[rank]
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if host == socket.gethostname() and process.create_time() == created:
                    process.kill()
        os._exit(EXIT_CODE)


LEFT = 1 << 60  # taken off a count, it makes it negative for good
