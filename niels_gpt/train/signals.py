"""SIGINT, SIGTERM and SIGHUP: the first asks the loop to save at the next step, the second leaves at once.

Python runs its handlers between bytecodes, so one that waits for a long backward pass comes late. The second signal is
therefore acted on by a thread of its own, which C wakes through a socket the moment a signal arrives.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from niels_gpt.command import Interrupted

OUTPUT_CLOSED = int(getattr(signal, "SIGPIPE", 13))  # stands in a StopRequest for a closed output; not caught
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@dataclass
class StopRequest:
    """Set by the handler, read at step boundaries and while evaluating."""

    signum: int = 0
    watched: bool = False  # the thread has seen one

    def __bool__(self) -> bool:
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Within the block the first signal only sets the request; a second one ends the process with 128+n.

    Signals that are ignored when it begins stay so (`nohup`). Outside the main thread, where Python cannot catch
    signals, the request simply stays unset.
    """
    request = StopRequest()
    caught = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        request.signum = request.signum or signum

    def watch(wakeups: socket.socket) -> None:
        with wakeups:
            while received := wakeups.recv(1):
                if received[0] in caught:
                    if request.watched:
                        os._exit(128 + received[0])
                    request.watched = True

    woken, waking = socket.socketpair()
    waking.setblocking(False)
    threading.Thread(target=watch, args=(woken,), name="second-signal", daemon=True).start()
    before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    previous = {s: signal.signal(s, handle) for s in caught}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before)
        waking.close()  # which ends the thread


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Within the block a signal raises Interrupted: for all that has nothing to save, such as opening caches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by signal {signum} with nothing to save", 128 + signum)

    previous = {s: signal.signal(s, leave) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
