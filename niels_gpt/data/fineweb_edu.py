"""fineweb_edu: one crawl of FineWeb-Edu, educational web pages, as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from niels_gpt.data.hub_text import describe_stream, streamed
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "fineweb_edu"


def stream(settings: Settings) -> Iterator[Document]:
    """The pages, shuffled in a buffer of `reproducibility.dataset_shuffle_buffer_size` unless told otherwise."""
    chosen = settings.data.fineweb_edu
    return streamed(NAME, chosen, chosen.name, settings.reproducibility.dataset_shuffle_buffer_size)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.fineweb_edu
    return describe_stream(chosen, chosen.name, settings.reproducibility.dataset_shuffle_buffer_size)
