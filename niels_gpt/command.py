"""How a program ends: its exit status, and one sentence for what went wrong."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from niels_gpt import files


class Interrupted(Exception):
    """A signal ended the work, after what it had to save was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def open_streams() -> None:
    """Give a program that was started without stdin, stdout or stderr (`<&-`, `>&-`) an empty one instead.

    Python has None for them, and the next file that is opened would get their number, and what is meant for them.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for as long as the program runs
            os.set_inheritable(stream.fileno(), stream.fileno() <= 2)
            setattr(sys, name, stream)


def exit_status(
    work: Callable[[], int | None],
    *,
    stopped: str | None = None,
    go_on: str | None = None,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
    reader_gone: int = 1,
) -> int:
    """Run a program's work and return its exit status: what `work` returns, or 0 for None.

    An exception in `expected` becomes `error: ...` on stderr and 1. Ctrl-C becomes 130, with the sentence `stopped`;
    Interrupted its own code, with its own sentence; a reader of stdout that has gone becomes `reader_gone`, silently.
    go_on: how to take up the work again, which is added to these three.
    reader_gone: 0 for what only shows something: its reader has what he wanted. 1 for work and for verdicts.
    Wrong usage is argparse's, and 2. Other exceptions are bugs: they pass.
    What the encoding of stdout lacks is written as escapes such as \\u2713, as Python does on stderr.
    """
    open_streams()
    try:
        _escape_unprintable()
        return _flushed(work)
    except BrokenPipeError:
        files.discard_output()
        _say(None if go_on is None else "the output was closed", go_on)
        return reader_gone
    except expected as error:
        _say(f"error: {files.explained(error)}")
        return 1
    except Interrupted as stop:
        _say(str(stop), go_on)
        return stop.exit_code
    except KeyboardInterrupt:
        _say("interrupted" if stopped is None and go_on is not None else stopped, go_on)
        return 130


def _flushed(work: Callable[[], int | None]) -> int:
    """Run the work and write out what stdout still holds: here, where a reader that has gone is dealt with."""
    try:
        status = work() or 0
    except SystemExit:  # of argparse, after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _escape_unprintable() -> None:
    """With LC_ALL=C most output could not be printed at all; a program that chose its own way keeps it."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(*parts: str | None) -> None:
    if line := "; ".join(part for part in parts if part is not None):
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:  # it went where stdout went
            files.discard_output(sys.stderr)
