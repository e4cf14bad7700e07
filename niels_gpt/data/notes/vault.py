"""A folder of notes as documents: read, cleaned, freed of secrets and duplicates, and grouped by shared passages.

    vault = open_vault(root, patterns, settings.data.notes, setting="data.roam.root_dir", hidden=True)
    for i in vault.kept: vault.notes[i].name, vault.text(i), vault.group[i]

The cleaned texts lie in a temporary file without a name once they outgrow memory, so a large folder costs disk, not
memory. A vault is remembered as long as its files do not change: a build asks for it several times.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from niels_gpt.data.notes.duplicates import find_duplicates
from niels_gpt.data.notes.formats import documents_of
from niels_gpt.data.notes.markdown import find_blocks
from niels_gpt.data.notes.overlap import fingerprints, link
from niels_gpt.data.notes.reading import Skipped, find_files, find_skipped, kind_of, read_file, shown_name
from niels_gpt.data.notes.secrets import mask
from niels_gpt.settings import NotesSettings
from niels_gpt.special_tokens import SPECIAL_TOKENS

RULES = 2  # raise it when the same files must give other texts than before
Progress = Callable[[str, int, int], None]  # what is being done, done so far, of how many
_IN_MEMORY = 64 << 20  # bytes of cleaned text before it goes to disk


@dataclass
class Note:
    """A document of the folder: a file, or one record of a JSON lines file. It is kept if it has no `reason`."""

    name: str
    kind: str
    reason: str = ""
    detail: str = ""
    encoding: str = ""
    secrets: dict[str, int] = field(default_factory=dict)
    control: bool = False  # it spells a special token, which cache builders refuse
    size: int = 0  # bytes of UTF-8 of the cleaned text
    start: int = 0  # where the text is in the store


class Vault:
    """The documents of a folder in order of their paths; `skipped` is what was not even opened."""

    def __init__(self, root: Path, settings: NotesSettings) -> None:
        self.root = root
        self.settings = settings
        self.notes: list[Note] = []
        self.paths: list[Path] = []  # of the files that were read
        self.skipped: list[Skipped] = []
        self.files: Counter[str] = Counter()  # by kind
        self.group: list[int] = []  # of every note: the first note that it shares a passage with, itself if none
        self._store = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  lives as long as the vault

    @cached_property
    def kept(self) -> list[int]:
        """Numbers of the notes to learn from, in order."""
        return [i for i, note in enumerate(self.notes) if not note.reason]

    def text(self, number: int) -> str:
        """The cleaned text of a note."""
        note = self.notes[number]
        self._store.seek(note.start)
        return self._store.read(note.size).decode("utf-8")

    def _add(self, note: Note, text: str) -> None:
        encoded = text.encode("utf-8", "replace")
        note.start, note.size = self._store.seek(0, os.SEEK_END), len(encoded)
        self._store.write(encoded)
        self.notes.append(note)


def scan(
    root: str | Path,
    patterns: Sequence[str],
    settings: NotesSettings,
    *,
    setting: str,
    hidden: bool,
    progress: Progress | None = None,
) -> Vault:
    """Read a whole folder of notes.

    Raises:
        FileNotFoundError: no such folder or no such files in it; the text names `setting`.
        PermissionError: the folder cannot be read. Nothing about a single file or folder in it is an error: what cannot
            be used is in the vault with its reason.
    """
    say = progress or (lambda what, done, total: None)
    vault = Vault(Path(root), settings)
    paths = vault.paths = find_files(root, patterns, setting, hidden=hidden)
    vault.skipped = find_skipped(root, patterns)
    blocks = _blocks(paths, settings) if settings.clean else {}
    for done, path in enumerate(paths, start=1):
        for note, text in _read(path, vault.root, settings, blocks):
            vault._add(note, text)
        vault.files[kind_of(path)] += 1
        say("reading", done, len(paths))
    _drop_duplicates(vault, say)
    _group(vault, say)
    return vault


def _blocks(paths: Sequence[Path], settings: NotesSettings) -> dict[str, str]:
    """Every block with an id; of two with one id, that of the first note."""
    found: dict[str, str] = {}
    for path in paths:
        if kind_of(path) == "markdown":
            text = read_file(path, settings.max_file_bytes).text
            if "id::" in text or " ^" in text:
                found = find_blocks(text) | found
    return found


def _read(path: Path, root: Path, settings: NotesSettings, blocks: dict[str, str]) -> Iterator[tuple[Note, str]]:
    name, kind = shown_name(root, path), kind_of(path)
    content = read_file(path, settings.max_file_bytes)
    if content.reason:
        yield Note(name, kind, content.reason, content.detail), ""
        return
    for suffix, raw in documents_of(content.text, kind, clean=settings.clean, blocks=blocks):
        note = Note(name + suffix, kind, encoding=content.encoding)
        text = raw.encode("utf-8", "replace").decode()
        if settings.secrets != "keep":
            masked, note.secrets = mask(text, settings.phone_region)
            text = masked if settings.secrets == "mask" else text
        note.control = any(literal in text for literal in SPECIAL_TOKENS.values())
        if not text:
            note.reason = "no text"
        elif note.secrets and settings.secrets == "skip":
            note.reason, note.detail = "secret", ", ".join(note.secrets)
        yield note, text


def _drop_duplicates(vault: Vault, say: Progress) -> None:
    if not vault.settings.drop_duplicates:
        return
    kept = [i for i, note in enumerate(vault.notes) if not note.reason]  # vault.kept is for afterwards

    def counted() -> Iterator[int]:
        for done, number in enumerate(kept, start=1):
            yield number
            say("comparing", done, len(kept))

    for number, found in find_duplicates(counted(), vault.text, vault.settings.near_duplicate).items():
        note, name = vault.notes[number], vault.notes[found.of].name
        note.reason = "exact duplicate" if found.exact else "near duplicate"
        note.detail = f"of {name}" if found.exact else f"of {name}, {found.similarity:.0%} the same"


def _group(vault: Vault, say: Progress) -> None:
    run = vault.settings.shared_run
    if not run:
        vault.group = list(range(len(vault.notes)))
        return

    def prints() -> Iterator[tuple[int, np.ndarray]]:
        for done, number in enumerate(vault.kept, start=1):
            yield number, fingerprints(vault.text(number), run)
            say("looking for shared passages", done, len(vault.kept))

    vault.group = link(prints(), len(vault.notes))


# Vaults that are remembered

_remembered: dict[tuple[object, ...], Vault] = {}
_MOST = 2  # a build of roam and text


def open_vault(
    root: str | Path,
    patterns: Sequence[str],
    settings: NotesSettings,
    *,
    setting: str,
    hidden: bool,
    progress: Progress | None = None,
) -> Vault:
    """`scan`, or what it found last time if no file has changed since (by size, time and inode)."""
    paths = find_files(root, patterns, setting, hidden=hidden)
    key = (os.getpid(), str(root), tuple(patterns), settings, hidden, tuple(_state(path) for path in paths))
    if key not in _remembered:
        while len(_remembered) >= _MOST:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = scan(root, patterns, settings, setting=setting, hidden=hidden, progress=progress)
    return _remembered[key]


def _state(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
