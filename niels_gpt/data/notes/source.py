"""What the sources roam and text have in common: which folder they read, and what their documents depend on."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt.data.notes.reading import find_files
from niels_gpt.data.notes.vault import RULES, Progress, Vault, open_vault
from niels_gpt.files import sha256_file
from niels_gpt.settings import Settings

_LIBRARIES = ("beautifulsoup4", "detect-secrets", "phonenumbers", "rensa")  # their versions decide what comes out


class Folder(NamedTuple):
    """Which files a source reads: those under `root` that match `patterns`; `hidden` counts names with a dot too."""

    root: str
    patterns: tuple[str, ...]
    setting: str
    hidden: bool


def folder_of(settings: Settings, source: str) -> Folder:
    """The folder of roam or text."""
    if source == "roam":
        roam = settings.data.roam
        return Folder(roam.root_dir, (roam.glob_pattern,), "data.roam.root_dir", True)
    text = settings.data.text
    return Folder(text.root_dir, tuple(text.glob_patterns), "data.text.root_dir", False)


def open_notes(settings: Settings, source: str, progress: Progress | None = None) -> Vault:
    """The documents of roam or text.

    Raises:
        FileNotFoundError: the folder or files in it are not there.
        ValueError: nothing in it can be used; the text says why.
    """
    root, patterns, setting, hidden = folder_of(settings, source)
    vault = open_vault(root, patterns, settings.data.notes, setting=setting, hidden=hidden, progress=progress)
    if not vault.kept:
        reasons = Counter(note.reason for note in vault.notes)
        shown = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        first = vault.notes[0]
        why = first.detail or first.reason
        raise ValueError(
            f"the source {source} has no text to train on: {shown} in {root}, such as {first.name} ({why}); "
            f"`niels-gpt notes --source {source} --dir {root} --dry-run` tells more"
        )
    return vault


def describe_notes(settings: Settings, source: str, split_rule: str) -> dict[str, Any]:
    """What the text of roam or text depends on: files, rules, settings, libraries. Hashes the files, cleans none."""
    root, patterns, setting, hidden = folder_of(settings, source)
    paths = find_files(root, patterns, setting, hidden=hidden)
    return {
        "dataset_name": source,
        "split_rule": f"documents that share a passage together, {split_rule}",
        "num_files": len(paths),
        "rules": RULES,
        "notes": settings.data.notes.model_dump(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "files": {path.relative_to(root).as_posix(): _sha256(path) for path in paths},
    }


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"
