"""SIGINT and SIGTERM: the first asks the loop to save at the next step, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Set by the handler, read at step boundaries."""

    signum: int = 0

    def __bool__(self) -> bool:
        return self.signum != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """Within the block the first signal only sets the request; a second one ends the process with 128+n.

    Outside the main thread, where Python cannot catch signals, the request simply stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request:
            os._exit(128 + signum)
        request.signum = signum

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
