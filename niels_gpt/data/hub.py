"""The Hugging Face hub: the one caller of `datasets` and `huggingface_hub`; what goes wrong becomes one line for people

Obeys HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as those libraries do. A dataset is pinned to one commit for the life of
the process, so that what is described is what is read. Without a connection the last download is used, with a warning.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from niels_gpt.data import hub_cache
from niels_gpt.data.hub_errors import (
    HubError,
    chain_of,
    first_line,
    huggingface_hub_for,
    is_unreachable,
    missing_package,
    status_of,
)

Row = dict[str, Any]

MOVED = {"wikitext": "Salesforce/wikitext"}  # old names that the hub redirects and `datasets` no longer accepts

# How long the libraries try again, on top of their timeouts (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT: 10 s each).
# They try a request 6 times within half a minute; a read of a stream may fail that often:
STREAM_RETRIES = 2
STREAM_RETRY_SECONDS = 2.0

_LEAVE_OUT = (
    "or leave the source out (data.mix_pretrain, data.mix_sft; for byte streams allow_missing_sources=True or "
    "required_sources=())"
)


@dataclass(frozen=True)
class Pinned:
    """A dataset at one commit."""

    dataset_id: str  # as on the hub today
    commit: str
    reached: bool  # whether the hub itself said so


@dataclass(frozen=True)
class _Asked:
    """What was to be read, for messages."""

    named: str
    pinned: Pinned
    split: str = ""
    streaming: bool = False


_pinned: dict[tuple[str, str | None], Pinned] = {}


def load(
    dataset_id: str,
    *,
    config: str | None = None,
    split: str,
    streaming: bool = False,
    revision: str | None = None,
    shuffle_seed: int | None = None,
    shuffle_buffer: int | None = None,
) -> Iterator[Row]:
    """The rows of one split, in order, or, of streams, shuffled in a buffer of `shuffle_buffer` rows if that is given.

    Without `streaming` the dataset is downloaded into the Hugging Face cache first, and the next time read from there.

    Raises:
        HubError: it cannot be had; also while iterating.
    """
    datasets = _datasets(dataset_id)
    pinned = pin(dataset_id, revision)
    asked = _Asked(f"{dataset_id} ({config})" if config else dataset_id, pinned, split, streaming)
    prepared = streaming or hub_cache.is_prepared(datasets.config.HF_DATASETS_CACHE, config, pinned.commit)
    try:
        with _asking_only_if(pinned.reached, datasets):
            data = datasets.load_dataset(
                pinned.dataset_id, config, split=split, streaming=streaming, revision=pinned.commit
            )
        if not streaming and data.cache_files:
            _check_commit(asked, Path(data.cache_files[0]["filename"]))
        if not prepared:
            _check_download(asked, datasets)
        if streaming and shuffle_buffer is not None:
            data = data.shuffle(seed=shuffle_seed, buffer_size=shuffle_buffer)
    except HubError:
        raise
    except Exception as error:
        if not streaming:
            _check_download(asked, datasets)  # what cannot be read may have been damaged on its way
        _explain(error, asked)
    return _rows(data, asked)


def _rows(data: Any, asked: _Asked) -> Iterator[Row]:
    try:
        yield from data
    except Exception as error:
        _explain(error, asked)


def commit_of(dataset_id: str, revision: str | None = None) -> str:
    """The commit that a dataset is read at: what its text depends on.

    Raises:
        HubError: the hub has no such dataset or revision, or cannot be reached and was not before.
    """
    return pin(dataset_id, revision).commit


def pin(dataset_id: str, revision: str | None = None) -> Pinned:
    """The dataset at the newest commit of `revision` (default: of main).

    Once the hub has answered, it is the same one for the life of the process (`forget` ends that).
    """
    key = dataset_id, revision
    if key not in _pinned:
        found = _pin(dataset_id, revision)
        if not found.reached:
            return found
        _pinned[key] = found
    return _pinned[key]


def forget() -> None:
    """Ask the hub again which commits are the newest."""
    _pinned.clear()


def _pin(dataset_id: str, revision: str | None) -> Pinned:
    from_hub, moved = huggingface_hub_for(dataset_id), MOVED.get(dataset_id, dataset_id)
    if "/" not in moved:
        raise HubError(f"{dataset_id}: a dataset of the hub is named owner/name; correct dataset_id in the settings")
    try:
        found = from_hub.HfApi().dataset_info(moved, revision=revision, timeout=from_hub.constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        cache = from_hub.constants.HF_HUB_CACHE
        down = is_unreachable(error) or status_of(error) >= 500
        commit = hub_cache.noted_commit(cache, moved, revision) if down else None
        if commit is None:
            _explain(error, _Asked(dataset_id, Pinned(moved, revision or "main", False)))
        if not from_hub.constants.is_offline_mode():
            _warn(f"{dataset_id}: the Hugging Face hub cannot be reached; reading what was downloaded ({commit[:7]})")
        return Pinned(moved, commit, False)
    _remember(from_hub, found.id, revision)
    return Pinned(found.id, found.sha, True)


def _remember(from_hub: ModuleType, dataset_id: str, revision: str | None) -> None:
    """Have the Hugging Face cache note the commit, so that it is known without a connection."""
    try:
        from_hub.hf_hub_download(dataset_id, "README.md", repo_type="dataset", revision=revision)
    except Exception as error:  # only a note; what really fails will fail again when data is read
        _warn(f"{dataset_id}: its README could not be read ({type(error).__name__})")


@contextmanager
def _asking_only_if(reached: bool, datasets: ModuleType) -> Iterator[None]:
    """Keep the libraries from trying for half a minute what has just failed; they read their caches at once instead."""
    constants = huggingface_hub_for("").constants
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not reached:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _check_commit(asked: _Asked, file: Path) -> None:
    """Refuse what `datasets` falls back to by itself: another commit of the dataset, from its cache."""
    if (found := file.parent.name) != asked.pinned.commit:
        raise HubError(
            f"{asked.named}: commit {asked.pinned.commit[:7]} could not be read, the Hugging Face cache only has "
            f"{found[:7]}; try again with a connection, {_LEAVE_OUT}"
        )


def _check_download(asked: _Asked, datasets: ModuleType) -> None:
    """Refuse, and remove, files whose hash is not that of the hub."""
    cache, pinned = huggingface_hub_for(asked.named).constants.HF_HUB_CACHE, asked.pinned
    if damaged := hub_cache.remove_damaged(cache, pinned.dataset_id, pinned.commit):
        hub_cache.remove_prepared(datasets.config.HF_DATASETS_CACHE, pinned.commit)
        raise HubError(
            f"{asked.named}: {', '.join(damaged[:3])} was damaged on its way (its hash is not the hub's) "
            "and is removed; try again"
        )


def _explain(error: Exception, asked: _Asked) -> NoReturn:
    """Raise `error` again as one line that says what to do."""
    chain = list(chain_of(error))
    full = next((e for e in chain if isinstance(e, OSError) and e.errno == errno.ENOSPC), None)
    if full is not None:
        raise full
    raise HubError(f"{asked.named}: {_problem(chain, asked)}") from error


def _problem(chain: list[BaseException], asked: _Asked) -> str:
    pinned, status = asked.pinned, status_of(chain[0])
    kinds = {kind.__name__ for error in chain for kind in type(error).__mro__}
    texts = " | ".join(str(error) for error in chain)
    if not pinned.reached and is_unreachable(chain[0]):
        return _out_of_reach(asked)
    if "RevisionNotFoundError" in kinds or "Revision '" in texts:
        return f"the hub has no revision {pinned.commit!r} of it (any more); correct or unset revision in the settings"
    if "GatedRepoError" in kinds or "gated dataset" in texts:
        return "its owners ask who downloads it; agree on its page on the hub, then log in with: hf auth login"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status in (401, 404):
        return f"the hub has no public dataset {pinned.dataset_id}; check its dataset_id, or log in with: hf auth login"
    if "Unknown split" in texts or "BuilderConfig" in texts or "Bad split" in texts:
        return f"no such split or configuration ({first_line(chain[0])}); correct them in the settings"
    if status == 429:
        return "the hub asks for fewer requests (429); wait some minutes and try again, or log in with: hf auth login"
    if status >= 500:
        return f"the hub answers with an error ({status}); try again later"
    if kinds & {"TimeoutException", "TimeoutError", "ReadTimeout", "ConnectTimeout"} or "timed out" in texts:
        return (
            "the hub is too slow: nothing came for too long; try again (what is downloaded is kept), or wait longer "
            "with HF_HUB_DOWNLOAD_TIMEOUT=60"
        )
    if "Consistency check failed" in texts or kinds & {"RemoteProtocolError", "ReadError", "IncompleteRead"}:
        return "the download broke off before its end; try again (what is downloaded is kept)"
    if is_unreachable(chain[0]):
        endpoint = huggingface_hub_for(asked.named).constants.ENDPOINT
        return f"the Hugging Face hub cannot be reached any more at {endpoint}; check the connection and try again"
    if kinds & {"ArrowInvalid", "ArrowException", "DatasetGenerationError", "JSONDecodeError"}:
        return (
            f"a file of its {asked.split} split cannot be read ({first_line(chain[-1])}); "
            "try again, or set revision to an older commit of it"
        )
    return f"it cannot be read: {type(chain[0]).__name__}: {first_line(chain[0])}"


def _out_of_reach(asked: _Asked) -> str:
    constants = huggingface_hub_for(asked.named).constants
    missing = f"it is not in the Hugging Face cache ({constants.HF_HOME})"
    why = "it is read as a stream, which is never kept" if asked.streaming else missing
    if constants.is_offline_mode():
        return f"{why}, and HF_HUB_OFFLINE forbids to connect; unset it and run once with a connection, {_LEAVE_OUT}"
    return (
        f"the Hugging Face hub cannot be reached at {constants.ENDPOINT}, and {why}; check the connection, {_LEAVE_OUT}"
    )


def _datasets(dataset_id: str) -> ModuleType:
    """The library, imported only here since it takes a second, with waits that end, and bars for terminals only."""
    try:
        import datasets
        import huggingface_hub.utils
    except ImportError as error:
        raise HubError(missing_package(dataset_id, error)) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_RETRIES
    datasets.config.STREAMING_OPEN_MAX_RETRIES = STREAM_RETRIES
    datasets.config.STREAMING_READ_RETRY_INTERVAL = STREAM_RETRY_SECONDS
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = STREAM_RETRY_SECONDS
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = STREAM_RETRY_SECONDS
    return datasets


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
