"""text: any folder of text files of yours. A file is a document; of a JSON lines file, every record is one.

Which split a document belongs to depends on its relative path and the seed alone, so adding a file moves no other one,
with two exceptions: a document that shares a passage with one for training is for training too, and so is the only one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt.data.notes.source import describe_notes, open_notes
from niels_gpt.data.notes.vault import Vault
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "text"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """The documents of one split, in order of their paths."""
    vault = open_notes(settings, NAME)
    train, val = split_vault(vault, settings)
    for i in val if split == "val" else train:
        yield Document(vault.text(i), NAME, vault.notes[i].name)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.text
    return describe_notes(
        settings, NAME, f"by hash of the relative path, val_frac={chosen.val_frac}, seed={chosen.split_seed}"
    )


def split_vault(vault: Vault, settings: Settings) -> tuple[list[int], list[int]]:
    """(train, val): the numbers of the documents that are kept. A group is val if all of it is drawn for val."""
    chosen, kept = settings.data.text, vault.kept
    drawn = {i for i in kept if is_val(vault.notes[i].name, chosen.val_frac, chosen.split_seed)}
    learned = {vault.group[i] for i in kept if i not in drawn}
    val = {i for i in kept if vault.group[i] not in learned} if len(kept) > 1 else set()
    return [i for i in kept if i not in val], sorted(val)


def is_val(relative: str, val_frac: float, seed: int) -> bool:
    """Whether the file of this relative path (with forward slashes) is for validation."""
    digest = hashlib.sha256(f"{seed}/{relative}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_frac * 2**64


def read_text(path: Path) -> str:
    """A file's text with LF line ends; ValueError, naming the file, unless it is UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 or move it away") from None
    return text.replace("\r\n", "\n")
