"""How a program ends: its exit status, and one sentence for what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from niels_gpt import files


def exit_status(
    work: Callable[[], int | None],
    *,
    stopped: str | None = None,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
    reader_gone: int = 1,
) -> int:
    """Run a program's work and return its exit status: what `work` returns, or 0 for None.

    An exception in `expected` becomes `error: ...` on stderr and 1; Ctrl-C becomes 130, with the sentence `stopped`;
    a reader of stdout that has gone becomes `reader_gone`, silently.
    Wrong usage is argparse's, and 2. Other exceptions are bugs: they pass.
    """
    try:
        status = work() or 0
        sys.stdout.flush()  # here, where a reader that has gone is dealt with
        return status
    except BrokenPipeError:
        files.discard_output()
        return reader_gone
    except expected as error:
        print(f"error: {files.explained(error)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if stopped is not None:
            print(stopped, file=sys.stderr, flush=True)
        return 130
