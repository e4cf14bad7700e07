"""text: any folder of text files of yours. A file is a document.

Which split a file belongs to depends on its relative path and the seed alone, so adding a file moves no other one
(except that the only file of a folder is always for training).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from niels_gpt.data.types import Document
from niels_gpt.files import sha256_file
from niels_gpt.settings import Settings

NAME = "text"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """The files of one split, in order of their paths; blank ones are left out."""
    chosen = settings.data.text
    root, found = Path(chosen.root_dir), _files(settings)
    for path in found:
        held_out = len(found) > 1 and is_val(path.relative_to(root).as_posix(), chosen.val_frac, chosen.split_seed)
        if held_out == (split == "val") and (text := read_text(path)):
            yield Document(text, NAME)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.text
    return {
        "dataset_name": NAME,
        "split_rule": f"by hash of the relative path, val_frac={chosen.val_frac}, seed={chosen.split_seed}",
        "files": hashes(_files(settings), Path(chosen.root_dir)),
    }


def is_val(relative: str, val_frac: float, seed: int) -> bool:
    """Whether the file of this relative path (with forward slashes) is for validation."""
    digest = hashlib.sha256(f"{seed}/{relative}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_frac * 2**64


def _files(settings: Settings) -> list[Path]:
    chosen = settings.data.text
    return find_files(chosen.root_dir, chosen.glob_patterns, "data.text.root_dir", hidden=False)


def find_files(root: str | Path, patterns: Sequence[str], setting: str, *, hidden: bool) -> list[Path]:
    """Files under `root` that match a pattern, each once, sorted; `hidden` includes those under names with a dot.

    Raises:
        FileNotFoundError: no such folder, or no such file in it; the text names `setting`, where the folder is set.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; put text files there or set {setting} to your folder")
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not hidden:
        found = {path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)}
    if not found:
        shown = " or ".join(patterns)
        raise FileNotFoundError(f"{root} holds no files that match {shown}; add some or set {setting} to your folder")
    return sorted(found)


def read_text(path: Path) -> str:
    """A file's text with LF line ends and without blank edges; ValueError, naming the file, unless it is UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 or move it away") from None
    return text.replace("\r\n", "\n").strip()


def hashes(paths: Sequence[Path], root: Path) -> dict[str, str]:
    """sha256 of every file, by its path under `root`."""
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in paths}
