"""Which bytes belong to a cache folder, whether they are still those that were written, and with which tokenizer.

`meta.json` lists the size and sha256 of every data file; `meta.json.sha256`, in the form `sha256sum -c` reads, guards
`meta.json` itself. Sizes are checked at every opening, before anything is mapped: reading a mapped file past its end
kills the process. Hashes are checked at the first opening and after any change: `.verified` remembers the sizes and
modification times that were found good. Published caches list no files; their
reader checks what it can.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from niels_gpt.cache.folder import LAST_FILE, whole_folder
from niels_gpt.files import read_json, sha256_bytes, sha256_file, write_json
from niels_gpt.settings import PHASES

DEFAULT_CACHE_DIR = Path("data/cache")
META, META_HASH = "meta.json", LAST_FILE
_VERIFIED = ".verified"
_BLOCK = 1 << 20
_SETTLED_NS = 2_000_000_000  # a file changed more recently may change again within one tick of its clock

FileList = Mapping[str, Mapping[str, Any]]  # relative name -> {"size", "sha256"}


class HashedFile:
    """A file hashed while it is written. Errors name its path. The first `keep` bytes of one that is there stay."""

    def __init__(self, folder: Path, name: str, keep: int | None = None) -> None:
        self.name, self.size = name, keep or 0
        self._path = folder / name
        self._sha256 = hashlib.sha256()
        self._path.parent.mkdir(exist_ok=True)
        if keep is not None:
            os.truncate(self._path, keep)
            with open(self._path, "rb") as written:
                for block in iter(lambda: written.read(_BLOCK), b""):
                    self._sha256.update(block)
        self._file = open(self._path, "wb" if keep is None else "ab")  # noqa: SIM115 (closed by finish or abandon)

    def write(self, content: bytes) -> None:
        """Append `content`; OSError names the file."""
        with _naming(self._path):
            self._file.write(content)
        self._sha256.update(content)
        self.size += len(content)

    def finish(self) -> dict[str, Any]:
        """Put the content on the disk; returns the file's entry for meta.json."""
        with _naming(self._path), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"size": self.size, "sha256": self._sha256.hexdigest()}

    def sync(self) -> int:
        """Put what was written so far on the disk; returns how many bytes that is."""
        with _naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.size

    def abandon(self) -> None:
        """Close without promising anything about the content."""
        with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json (sorted keys, no time stamps: equal builds are equal bytes) and the file that guards it."""
    text = json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in ((META, text.encode()), (META_HASH, _hash_line(text.encode()))):
        file = HashedFile(folder, name)
        file.write(content)
        file.finish()


def _hash_line(meta: bytes) -> bytes:
    return f"{sha256_bytes(meta)}  {META}\n".encode()


def _read_meta(folder: Path, advice: str) -> dict[str, Any]:
    """The content of meta.json, after it was checked against its guard.

    Raises:
        FileNotFoundError: there is no meta.json.
        ValueError: it is damaged; `advice` says how to get a good one.
    """
    path, guard = folder / META, folder / META_HASH
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is damaged or not finished: it has no {META}; {advice}") from None
    expected = guard.read_bytes() if guard.is_file() else None
    if expected is not None and expected != _hash_line(content):
        should = f"{guard} names {_hash_in(expected)}"
        raise ValueError(f"{path} is damaged: its sha256 is {sha256_bytes(content)}, but {should}; {advice}")
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise ValueError(f"{path} must hold a JSON object; {advice}")
    if expected is None and "files" in meta:
        raise ValueError(f"{guard} is missing, so {path} cannot be trusted; {advice}")
    return meta


def _hash_in(guard: bytes) -> str:
    """The hash in a guard's line, for a message; the guard may be the damaged one."""
    hash_, _, _ = guard.decode("ascii", "replace").partition(" ")
    return hash_ if re.fullmatch("[0-9a-f]{64}", hash_) else "no sha256"


def open_folder(
    root: str | Path, source: str, *, verify: bool = False, optional: Sequence[str] = ()
) -> tuple[Path, dict[str, Any], str]:
    """Find and check a cache's files: (folder, meta.json, what to do when something is wrong with it).

    Raises FileNotFoundError or ValueError, naming the file; files named in `optional` may be missing.
    """
    target = Path(root) / source
    folder, advice = whole_folder(target), build_advice(target)
    if not folder.is_dir():
        raise FileNotFoundError(f"no cache at {target}; {advice}")
    meta = _read_meta(folder, advice)
    expected = meta.get("files", {})
    _check_files(
        folder,
        {name: entry for name, entry in expected.items() if name not in optional or (folder / name).is_file()},
        advice,
        verify=verify,
    )
    return folder, meta, advice


def check_tokenizer(
    folder: Path,
    meta: Mapping[str, Any],
    advice: str,
    tokenizer_sha256: str | None,
    vocab_size: int,
    special_token_ids: Mapping[str, int] | None,
) -> None:
    """ValueError unless the cache was built with this tokenizer and fits a model of `vocab_size` ids."""
    built_with = meta.get("tokenizer_sha256")
    if built_with != tokenizer_sha256:
        raise ValueError(
            f"tokenizer hash mismatch: {folder} was built with tokenizer {built_with}, "
            f"but the tokenizer in use is {tokenizer_sha256}; {advice}"
        )
    ids = meta.get("special_token_ids", special_token_ids)
    if special_token_ids is not None and ids != dict(special_token_ids):
        raise ValueError(
            f"special token ids mismatch: {folder} was built with {ids}, expected {dict(special_token_ids)}; {advice}"
        )
    pieces = meta.get("vocab_size", 0)
    if pieces > vocab_size:
        raise ValueError(
            f"{folder} was built with a vocabulary of {pieces} pieces, but the model has V={vocab_size}; "
            f"set model.V to {pieces} or more"
        )


def build_advice(target: Path) -> str:
    """What to do about a missing or bad cache at ROOT/SOURCE: the command that builds it.

    Which config a run has is not known here; tokenizer and folders are those of the config.
    """
    command = f"python -m niels_gpt.cache.cli build {target.name}"
    if target.parent.name in PHASES:
        command += f" --phase {target.parent.name}"
        if target.parent.parent != DEFAULT_CACHE_DIR:
            command += f" --cache-dir {target.parent.parent}"
    return f"build it with: {command} --config FILE, the config you train with"


def _check_files(folder: Path, expected: FileList, advice: str, *, verify: bool = False) -> None:
    """Check the sizes of `expected`, and their hashes unless the same sizes and times were found good before.

    `verify` hashes in any case.

    Raises:
        FileNotFoundError: files are missing, all of them named.
        ValueError: a file has another size or content than it was written with; file and both hashes are named.
    """
    missing = [str(folder / name) for name in expected if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"missing from the cache: {', '.join(missing)}; {advice}")
    found = {name: _stamp(folder / name) for name in (*expected, META)}
    for name, entry in expected.items():
        if found[name][0] != entry["size"]:
            raise _damaged(folder / name, entry, found[name][0], advice)
    if not verify and found == _known_good(folder):
        return
    for name, entry in expected.items():
        if sha256_file(folder / name) != entry["sha256"]:
            raise _damaged(folder / name, entry, found[name][0], advice)
    if all(time.time_ns() - changed > _SETTLED_NS for _, changed in found.values()):
        with contextlib.suppress(OSError):  # a folder that may only be read is hashed every time
            write_json(folder / _VERIFIED, found)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _known_good(folder: Path) -> Any:
    try:
        return read_json(folder / _VERIFIED)
    except (OSError, ValueError):
        return None


def _damaged(path: Path, entry: Mapping[str, Any], size: int, advice: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {size} bytes with sha256 {sha256_file(path)}, "
        f"but it was written with {entry['size']} bytes and sha256 {entry['sha256']}; {advice}"
    )
