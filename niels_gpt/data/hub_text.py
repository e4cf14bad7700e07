"""What the text sources of the Hugging Face hub share: the text of a row, limits, streams, descriptions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from niels_gpt.data import hub
from niels_gpt.data.types import Document
from niels_gpt.settings.data import FinewebEduSettings, GutenbergSettings, HubTextSettings, LimitedSettings

TEXT_COLUMNS = ("text", "content", "document")


def text_of(row: Mapping[str, Any], where: str) -> str:
    """The first of `TEXT_COLUMNS` that is a string; ValueError, naming the columns there are, if none is."""
    for column in TEXT_COLUMNS:
        if isinstance(text := row.get(column), str):
            return text
    raise ValueError(
        f"{where}: no column of text among {', '.join(map(ascii, row))}; {' or '.join(TEXT_COLUMNS)} is read"
    )


def limited(documents: Iterable[Document], chosen: LimitedSettings) -> Iterator[Document]:
    """The documents up to `max_examples`, and up to the one with which `max_bytes` of UTF-8 are reached."""
    n_bytes = 0
    for n_documents, document in enumerate(documents, start=1):
        yield document
        n_bytes += len(document.text.encode("utf-8", "surrogatepass"))
        if n_documents == chosen.max_examples or (chosen.max_bytes is not None and n_bytes >= chosen.max_bytes):
            return


def streamed(
    name: str, chosen: FinewebEduSettings | GutenbergSettings, config: str | None, buffer: int
) -> Iterator[Document]:
    """The documents of a stream, shuffled in a buffer of so many rows if `chosen.shuffle` is set."""
    rows = hub.load(
        chosen.dataset_id,
        config=config,
        split=chosen.split,
        streaming=True,
        revision=chosen.revision,
        shuffle_seed=chosen.seed,
        shuffle_buffer=buffer if chosen.shuffle else None,
    )
    return limited((Document(text_of(row, chosen.dataset_id), name) for row in rows), chosen)


def describe_stream(chosen: FinewebEduSettings | GutenbergSettings, config: str | None, buffer: int) -> dict[str, Any]:
    """What the text of a stream depends on; the order of a shuffled one also depends on the library that shuffles."""
    shuffling = {
        "stream_buffer": buffer,
        "stream_seed": chosen.seed,
        "stream_shuffled_by": f"datasets {importlib.metadata.version('datasets')}",
    }
    return {
        **describe_rows(chosen, config),
        "split_rule": "val tokens first, remaining to train",
        "dataset_split": chosen.split,
        **(shuffling if chosen.shuffle else {"stream_buffer": None}),
    }


def describe_rows(chosen: HubTextSettings, config: str | None) -> dict[str, Any]:
    """Which rows a dataset of the hub gives."""
    return {
        "dataset_name": chosen.dataset_id,
        "dataset_config": config,
        "dataset_revision": hub.commit_of(chosen.dataset_id, chosen.revision),
        "max_examples": chosen.max_examples,
        "max_bytes": chosen.max_bytes,
    }
