"""The Hugging Face cache on disk: which commit of a dataset it last saw, and whether a download is what the hub has.

The libraries check a download's size alone. A file's name among the blobs is the hub's hash of it, so its bytes can be
checked too: sha256 of large files, git's sha1 of small ones.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from niels_gpt.files import sha256_file

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


def folder_of(hub_cache: str | Path, dataset_id: str) -> Path:
    """Where the cache keeps the files of a dataset."""
    return Path(hub_cache) / f"datasets--{dataset_id.replace('/', '--')}"


def noted_commit(hub_cache: str | Path, dataset_id: str, revision: str | None) -> str | None:
    """The commit that a revision (default: main) was when it was last asked for; None if it never was."""
    folder = folder_of(hub_cache, dataset_id)
    noted = folder / "refs" / (revision or "main")
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip()
    return revision if revision and (folder / "snapshots" / revision).is_dir() else None


def is_prepared(datasets_cache: str | Path, config: str | None, commit: str) -> bool:
    """Whether `datasets` has made its own files of this commit, so that it will not download it."""
    return any(Path(datasets_cache).glob(f"*/{config or '*'}/*/{commit}"))


def remove_damaged(hub_cache: str | Path, dataset_id: str, commit: str) -> list[str]:
    """Delete downloaded files of a commit that are not what the hub has; returns their names in the dataset."""
    snapshot = folder_of(hub_cache, dataset_id) / "snapshots" / commit
    damaged = []
    for path in sorted(snapshot.rglob("*")):
        if path.is_symlink() and path.is_file() and not has_hash(path.resolve(), path.resolve().name):
            damaged.append(path.relative_to(snapshot).as_posix())
            path.resolve().unlink()
            path.unlink()
    return damaged


def remove_prepared(datasets_cache: str | Path, commit: str) -> None:
    """Delete what `datasets` made of a commit."""
    for folder in Path(datasets_cache).glob(f"*/*/*/{commit}"):
        shutil.rmtree(folder, ignore_errors=True)


def has_hash(path: Path, digest: str) -> bool:
    """Whether a file is what the hub's hash of it says; True for a hash of another kind, which says nothing."""
    if _SHA256.fullmatch(digest):
        return sha256_file(path) == digest
    if _SHA1.fullmatch(digest):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == digest
    return True
