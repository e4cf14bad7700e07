"""Finding the files of a folder of notes and decoding them: whatever is wrong with one is a reason, never an error.

Symbolic links are not followed: a link inside the folder would be a duplicate, one that leads out of it is not yours to
learn from by accident, and one that loops has no end. The bin and the working folders of the note apps are left out.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

APP_FOLDERS = (".git", ".obsidian", ".trash", "logseq/bak", "logseq/.recycle")  # settings, backups and deleted notes
KINDS = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}  # by suffix; anything else is plain text
_MARKS = (  # longer marks first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PROBE = 8192  # bytes in which a NUL means that a file is no text


@dataclass(frozen=True)
class Skipped:
    """Something that is not read: its path under the folder, a reason in a word or two, and what else is known."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Content:
    """What a file holds: its text, or the reason why it has none; `encoding` is set where it is not UTF-8."""

    text: str = ""
    reason: str = ""
    detail: str = ""
    encoding: str = ""
    size: int = 0


def kind_of(path: Path) -> str:
    """markdown, html, jsonl or text."""
    return KINDS.get(path.suffix.lower(), "text")


def find_files(root: str | Path, patterns: Sequence[str], setting: str, *, hidden: bool) -> list[Path]:
    """Files under `root` that match a pattern, each once, sorted; `hidden` includes those under names with a dot.

    Links and the folders of `APP_FOLDERS` are left out.

    Raises:
        FileNotFoundError: no such folder, or no such file in it; the text names `setting`, where the folder is set.
    """
    root = Path(root)
    found = {path for path in _matches(root, patterns, setting) if not path.is_symlink() and path.is_file()}
    found = {path for path in found if not _in_app_folder(path.relative_to(root))}
    if not hidden:
        found = {path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)}
    if not found:
        shown = " or ".join(patterns)
        raise FileNotFoundError(f"{root} holds no files that match {shown}; add some or set {setting} to your folder")
    return sorted(found)


def find_skipped(root: str | Path, patterns: Sequence[str], setting: str) -> list[Skipped]:
    """What `find_files` left out though it is there: links, what the note apps keep, folders that cannot be read."""
    root = Path(root)
    skipped = []
    for path in _matches(root, patterns, setting):
        if not path.is_symlink() and _in_app_folder(path.relative_to(root)) and path.is_file():
            skipped.append(Skipped(path.relative_to(root).as_posix(), "app folder"))
        elif path.is_symlink() and not path.is_dir():
            skipped.append(_link(root, path))

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix() if error.filename else ""
        skipped.append(Skipped(name, "unreadable", error.strerror or ""))

    for folder, names, _ in os.walk(root, onerror=unreadable):
        skipped += [_link(root, Path(folder) / name) for name in names if (Path(folder) / name).is_symlink()]
    return sorted(set(skipped), key=lambda one: one.name)


def read_file(path: Path, max_bytes: int) -> Content:
    """The text of a file with LF line ends; UTF-8, or UTF-16 and UTF-32 where a byte order mark says so."""
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        return Content(reason="vanished")
    except OSError as error:
        return Content(reason="unreadable", detail=error.strerror or type(error).__name__)
    if len(raw) > max_bytes:
        return Content(reason="too big", detail=f"over data.notes.max_file_bytes = {max_bytes:,}")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in raw[:_PROBE]:
        return Content(reason="binary", size=len(raw))
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        said = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        return Content(reason=f"not {said}", detail=f"byte {error.start}", size=len(raw))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return Content(reason="empty", size=len(raw))
    return Content(text, encoding="" if encoding.startswith("utf-8") else encoding.upper(), size=len(raw))


def _matches(root: Path, patterns: Sequence[str], setting: str) -> set[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; put text files there or set {setting} to your folder")
    return {path for pattern in patterns for path in root.glob(pattern)}


def _in_app_folder(relative: Path) -> bool:
    padded = f"/{relative.as_posix()}"
    return any(f"/{folder}/" in padded for folder in APP_FOLDERS)


def _link(root: Path, path: Path) -> Skipped:
    name = path.relative_to(root).as_posix()
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        return Skipped(name, "link", "leads nowhere")
    except (OSError, RuntimeError):  # RuntimeError: how Python before 3.13 says that a link loops
        return Skipped(name, "link", "loops")
    if target.is_dir() and path.parent.resolve().is_relative_to(target):
        return Skipped(name, "link", "loops")
    inside = target.is_relative_to(root.resolve())
    return Skipped(name, "link", "leads to another place in the folder" if inside else "leads out of the folder")
