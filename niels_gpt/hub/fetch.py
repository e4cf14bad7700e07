"""One file of a model repository of the Hugging Face hub, brought to one place: whole and checked, or not at all.

`hf_hub_download` starts again from the first byte in every process and does not compare hashes. So the library tells
where the file is and receives it, and here is what a large file needs: it goes on where it broke off, its size and its
hash are the hub's, and a caller's own check comes before the final name appears. Data sets have `data.hub`.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn, TypeVar

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from niels_gpt import files
from niels_gpt.data.hub_cache import has_hash
from niels_gpt.data.hub_errors import HubError, chain_of, first_line, huggingface_hub_for, is_unreachable, status_of

DEFAULT_REPO = "nnandal/niels-gpt"
PARTS = ".download"  # beside the target: what has come so far
CHUNK = 1 << 16  # bytes that are written at a time: a connection that breaks costs no more than these
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try after an answer that may be better the next time
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # such answers
_LOGIN = "log in with: hf auth login"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """A file of a repository at one commit."""

    repo: str
    file: str
    commit: str
    size: int  # bytes
    digest: str  # sha256, or git's sha1 of small files

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.repo}: {self.file}"


class NotThere(HubError):
    """The repository, the revision or the file does not exist, or only for others."""


def repo_id(text: str) -> str:
    """The type of --repo: OWNER/NAME as the hub allows it; anything else is a usage error."""
    if text == DEFAULT_REPO:
        return text
    if text.count("/") != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a model: it is named owner/name")
    with suppress(HubError):  # without the library: the work says what to install, where it needs it
        huggingface_hub_for(text)
        try:
            import_module("huggingface_hub.utils").validate_repo_id(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(first_line(error)) from None
    return text


def locate(repo: str, file: str, revision: str | None = None) -> Remote:
    """Ask the hub for a file at the newest commit of a revision (default: main).

    Raises:
        HubError: it is not there (NotThere), or the hub cannot be asked.
    """
    library = library_for(repo)
    if repo.count("/") != 1:
        raise NotThere(f"{repo}: a model of the hub is named owner/name")
    url = library.hf_hub_url(repo, file, revision=revision)
    found = patiently(lambda: library.get_hf_file_metadata(url), f"{repo}: {file}", revision)
    if found.size is None or found.commit_hash is None:
        raise HubError(f"{repo}: {file}: the hub says neither how large it is nor of which commit; try again later")
    return Remote(repo, file, found.commit_hash, found.size, found.etag or "")


def fetch(remote: Remote, target: Path, check: Callable[[Path], None]) -> None:
    """Make `target` this file, going on with what an earlier try left beside it.

    check: called with the whole file, still under another name; what it raises stops everything.
    Raises HubError (in one line), OSError (the disk), and what `check` raises; `target` is then as it was, and what has
    come so far is kept for the next try unless it turned out to be wrong.
    """
    folder = target.parent / PARTS
    part = folder / files.sha256_bytes(f"{remote.name} {remote.digest}".encode())[:16] / target.name
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{part}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise HubError(f"{remote.name}: another process is downloading it to {target}; wait for it") from None
    try:
        _receive(remote, part)
        _check(remote, part, check)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        files.fsync_folder(target.parent)
    finally:
        lock.release()
        if not part.exists() or part.stat().st_size == 0:
            shutil.rmtree(part.parent, ignore_errors=True)
            with suppress(OSError):  # other downloads may have left something
                folder.rmdir()


def _receive(remote: Remote, part: Path) -> None:
    if part.exists() and part.stat().st_size > remote.size:
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    if free < remote.size - have:
        _disk_full(remote, part)
    url = library_for(remote.repo).hf_hub_url(remote.repo, remote.file, revision=remote.commit)
    receiver, utils = import_module("huggingface_hub.file_download"), import_module("huggingface_hub.utils")
    with _progress(remote, have) as moved:

        def receive() -> None:
            with open(part, "ab") as file:
                receiver.http_get(
                    url,
                    _Watched(file, moved),
                    resume_size=file.tell(),
                    headers=utils.build_hf_headers(),
                    expected_size=remote.size,
                    displayed_filename=remote.file,
                )

        try:
            patiently(receive, remote.name, remote.commit)
        except OSError as error:
            if any(files.is_disk_full(cause) for cause in chain_of(error) if isinstance(cause, OSError)):
                _disk_full(remote, part)
            raise


def _check(remote: Remote, part: Path, check: Callable[[Path], None]) -> None:
    if part.stat().st_size != remote.size or not has_hash(part, remote.digest):
        part.unlink()
        raise HubError(f"{remote.name} was damaged on its way: its hash is not the hub's. It is removed; try again")
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{str(error).replace(str(part), remote.name)} (it was not kept)") from None


def _disk_full(remote: Remote, part: Path) -> NoReturn:
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(part.parent).free
    raise OSError(
        errno.ENOSPC,
        f"the disk is full: {remote.name} needs {(remote.size - have) / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are "
        "free here (quotas and file-size limits count too). Free some space and try again: what has come is kept",
    ) from None


class _Watched:
    """A file that tells where it is, since the library's own bar knows no other output."""

    def __init__(self, file: IO[bytes], moved: Callable[[int], None]) -> None:
        self._file, self._moved = file, moved

    def write(self, block: bytes) -> int:
        written = self._file.write(block)
        self._moved(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _progress(remote: Remote, have: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody watches; yields a function that is told how many bytes are here."""
    console = Console(file=sys.stderr)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(remote.file, total=remote.size, completed=have)
        yield lambda here: bar.update(task, completed=here)


# talking to the hub


def library_for(what: str) -> ModuleType:
    """huggingface_hub, without its bars and its warnings about tries that are tried again."""
    library, utils = huggingface_hub_for(what), import_module("huggingface_hub.utils")
    library.constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    return library


def patiently(ask: Callable[[], Result], what: str, revision: str | None = None) -> Result:
    """The result of `ask`, tried again after answers that may be better the next time; HubError in one line else."""
    for wait in (*WAITS, None):
        try:
            return ask()
        except Exception as error:
            broke_off = "Consistency check failed" in str(error)
            if wait is None or not (broke_off or status_of(error) in _PASSING):
                _explain(error, what, revision)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _explain(error: Exception, what: str, revision: str | None) -> NoReturn:
    """Raise `error` again as one line that says what to do; a full disk stays what it is."""
    chain = list(chain_of(error))
    if isinstance(error, OSError) and error.errno is not None and not is_unreachable(error):
        raise error
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    status = status_of(error)
    if "RevisionNotFoundError" in kinds:
        raise NotThere(f"{what}: there is no revision {revision!r} of it; --revision names a branch, tag or commit")
    if "EntryNotFoundError" in kinds:
        raise NotThere(f"{what}: there is no such file in the repository; --file names another")
    if "GatedRepoError" in kinds:
        raise NotThere(f"{what}: its owners ask who downloads it; agree on its page on the hub, then {_LOGIN}")
    if "RepositoryNotFoundError" in kinds or status == 404:
        raise NotThere(
            f"{what}: there is no such public model on the hub; check its name, or, if it is private, {_LOGIN}"
        )
    if status == 401 or "LocalTokenNotFoundError" in kinds:
        raise HubError(f"{what}: the hub does not know you: {_LOGIN}, with a token that may write what you upload")
    if status == 403:
        raise HubError(
            f"{what}: you may not do that (403): the token has no such right, or the repository is not yours"
        )
    raise HubError(f"{what}: {_trouble(error, kinds, status)}") from error


def _trouble(error: Exception, kinds: set[str], status: int) -> str:
    constants = huggingface_hub_for("").constants
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE forbids to connect to the hub; unset it and try again"
    if status == 429:
        return "the hub asks for fewer requests (429); wait some minutes and try again"
    if status >= 500:
        return f"the hub answers with an error ({status}) again and again; try again later"
    if kinds & {"TimeoutException", "TimeoutError"}:
        return "nothing came from the hub for too long; try again (what has come is kept)"
    if "Consistency check failed" in str(error) or status == 416 or kinds & {"RemoteProtocolError", "ReadError"}:
        return "the transfer broke off; try again (what has come is kept)"
    if is_unreachable(error):
        return f"the Hugging Face hub cannot be reached at {constants.ENDPOINT}; check the connection and try again"
    return f"{type(error).__name__}: {first_line(error)}"
