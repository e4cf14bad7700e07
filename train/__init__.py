"""The specification's short name for niels_gpt.train: `python -m train.run` runs niels_gpt/train/run.py."""

import sys
from types import TracebackType

from niels_gpt.train import __path__  # noqa: F401

if sys.argv[0] == "-m":  # Python is looking for the program; its libraries take seconds to load

    def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Ctrl-C before `main` runs is no bug."""
        if kind is KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = _without_traceback
