"""Finding the files of a folder of notes and decoding them: whatever is wrong with one is a reason, never an error.

Symbolic links are not followed: a link inside the folder would be a duplicate, one that leads out of it is not yours to
learn from by accident, and one that loops has no end. The bin and the working folders of the note apps are left out.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

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

    Patterns are those of `glob`, in whatever case. Links and the folders of `APP_FOLDERS` are left out.

    Raises:
        FileNotFoundError: no such folder, or no such file in it; the text names `setting`, where the folder is set.
        PermissionError: the folder itself cannot be read, or nothing in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; put text files there or set {setting} to your folder")
    found, skipped = _look(root, patterns, hidden)
    unreadable = [one for one in skipped if one.reason == "unreadable"]
    if not found and unreadable:
        what = root / unreadable[0].name
        raise PermissionError(f"{what} cannot be read ({unreadable[0].detail}); you need to be allowed to read {root}")
    if not found:
        shown = " or ".join(patterns)
        raise FileNotFoundError(f"{root} holds no files that match {shown}; add some or set {setting} to your folder")
    return found


def find_skipped(root: str | Path, patterns: Sequence[str]) -> list[Skipped]:
    """What `find_files` left out though it is there: links, what the note apps keep, what cannot be read."""
    return _look(Path(root), patterns, hidden=True)[1]


def find_others(root: Path, read: Iterable[Path]) -> Counter[str]:
    """How many files of a kind that could be read, by suffix, are not among those that were."""
    found = set(_look(root, ["**/*"], hidden=False)[0]) - set(read)
    return Counter(suffix for path in found if (suffix := path.suffix.lower()) in {*KINDS, ".txt"})


def shown_name(root: Path, path: Path) -> str:
    """The path under `root` for people and JSON: what is not UTF-8 in it becomes `?`."""
    return path.relative_to(root).as_posix().encode("utf-8", "replace").decode()


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


def _look(root: Path, patterns: Sequence[str], hidden: bool) -> tuple[list[Path], list[Skipped]]:
    """(files to read, what else matches or cannot be looked into), both sorted."""
    wanted = [PurePosixPath(pattern.lower()).parts for pattern in patterns]
    found: list[Path] = []
    skipped: list[Skipped] = []

    def unreadable(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename)) if error.filename else root
        skipped.append(Skipped(shown_name(root, path), "unreadable", error.strerror or ""))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        skipped += [_link(root, Path(folder, name)) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root)
            if not any(_fits(relative.as_posix().lower().split("/"), parts) for parts in wanted):
                continue
            try:
                mode = path.lstat().st_mode
            except OSError as error:  # a folder that may be listed but not entered
                unreadable(error)
                continue
            if stat.S_ISLNK(mode):
                skipped.append(_link(root, path))
            elif stat.S_ISREG(mode) and _in_app_folder(relative):
                skipped.append(Skipped(shown_name(root, path), "app folder"))
            elif stat.S_ISREG(mode) and (hidden or not any(part.startswith(".") for part in relative.parts)):
                found.append(path)
    return sorted(found), sorted(skipped, key=lambda one: one.name)


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern, both divided at their slashes; `**` is any number of folders."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[n:], pattern[1:]) for n in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _in_app_folder(relative: Path) -> bool:
    padded = f"/{relative.as_posix()}"
    return any(f"/{folder}/" in padded for folder in APP_FOLDERS)


def _link(root: Path, path: Path) -> Skipped:
    name = shown_name(root, path)
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        return Skipped(name, "link", "leads nowhere")
    except PermissionError:
        return Skipped(name, "link", "leads to a place that cannot be read")
    except (OSError, RuntimeError):  # RuntimeError: how Python before 3.13 says that a link loops
        return Skipped(name, "link", "loops")
    if target.is_dir() and path.parent.resolve().is_relative_to(target):
        return Skipped(name, "link", "loops")
    inside = target.is_relative_to(root.resolve())
    return Skipped(name, "link", "leads to another place in the folder" if inside else "leads out of the folder")
