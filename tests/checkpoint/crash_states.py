"""What a power cut may leave on disk: every prefix of a recorded run of file operations, with every legal loss.

Model, as in Pillai et al. 2014 ("All file systems are not created equal"): a file's content is safe after its fsync, a
name after the fsync of its folder; until then each name operation may be lost on its own and content may be half there.
"""

import builtins
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Recording:
    """Operations in order, and what each file (by inode) finally held."""

    root: Path
    operations: list[tuple[Any, ...]] = field(default_factory=list)
    content: dict[int, bytes] = field(default_factory=dict)

    def add(self, *operation: Any) -> None:
        self.operations.append(operation)

    def keep(self, path: Path) -> int:
        inode = path.stat().st_ino
        self.content[inode] = path.read_bytes()
        return inode

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch `open` for writing, fsync, replace, link and unlink below `root`."""
        real = {"open": builtins.open, "fsync": os.fsync, "replace": os.replace, "link": os.link, "unlink": os.unlink}

        def watched_open(path, mode="r", *args, **kwargs):
            file = real["open"](path, mode, *args, **kwargs)
            if "w" in mode and self.root in Path(path).parents:
                self.add("name", Path(path), os.fstat(file.fileno()).st_ino)
            return file

        def fsync(handle):
            real["fsync"](handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.add(*(("sync folder", path) if path.is_dir() else ("sync", self.keep(path))))

        def replace(source, target):
            inode = self.keep(Path(source))
            real["replace"](source, target)
            self.add("rename", Path(target), inode, Path(source))

        def link(source, target):
            real["link"](source, target)
            self.add("name", Path(target), self.keep(Path(source)))

        def unlink(path, *args, **kwargs):
            real["unlink"](path, *args, **kwargs)
            self.add("unname", Path(path))

        monkeypatch.setattr(builtins, "open", watched_open)
        for name, function in (("fsync", fsync), ("replace", replace), ("link", link), ("unlink", unlink)):
            monkeypatch.setattr(os, name, function)


def crash_states(
    recording: Recording, before: dict[Path, bytes], *, forget: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[Path, bytes]]]:
    """Yield (operations done, name -> content), the emptiest first of each prefix, the whole run first of all.

    forget: pretend these operations never happened.
    """
    operations = [o for o in recording.operations if o[0] not in forget]
    for done in range(len(operations), -1, -1):
        prefix = operations[:done]
        synced = {o[1] for o in prefix if o[0] == "sync"}
        safe, pending = [], []
        for index, operation in enumerate(prefix):
            if operation[0] in ("name", "rename", "unname"):
                folder = operation[1].parent
                is_safe = any(o[0] == "sync folder" and o[1] == folder for o in prefix[index:])
                (safe if is_safe else pending).append(index)
        for kept in itertools.product((False, True), repeat=len(pending)):
            survivors = sorted([*safe, *itertools.compress(pending, kept)])
            names: dict[Path, bytes] = dict(before)
            for operation in (prefix[i] for i in survivors):
                names.pop(operation[1] if operation[0] == "unname" else operation[-1], None)  # type: ignore[arg-type]
                if operation[0] != "unname":
                    whole = recording.content[operation[2]]
                    names[operation[1]] = whole if operation[2] in synced else whole[: len(whole) // 2]
            yield done, names
