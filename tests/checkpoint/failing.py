"""File operations that fail on demand: the n-th of them, whichever it is."""

import builtins
import os
from pathlib import Path

import pytest

CALLS = ((os, "replace"), (os, "fsync"), (os, "open"), (os, "link"), (builtins, "open"))
REAL_FSYNC = os.fsync


class FailingCall:
    """The n-th watched call raises, all others go through."""

    def __init__(self, n: int, number: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.number, self.root, self.count = n, number, root, 0
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, function):
        def call(*args, **kwargs):
            named = [Path(a) for a in args if isinstance(a, (str, Path))]
            mine = function is REAL_FSYNC or any(self.root in (p, *p.parents) for p in named)
            self.count += mine
            if mine and self.count == self.n:
                raise OSError(self.number, os.strerror(self.number))
            return function(*args, **kwargs)

        return call


def newly_written(root: Path, known: set[tuple[int, ...]]) -> list[Path]:
    """The checkpoints below a folder that are not in `known`, hard links once; `known` is then all that are there."""
    found = {(s.st_ino, s.st_mtime_ns, s.st_size): path for path in root.rglob("*.pt") if (s := path.stat())}
    new = [path for key, path in found.items() if key not in known]
    known.clear()
    known.update(found)
    return new
