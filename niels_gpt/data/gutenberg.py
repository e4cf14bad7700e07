"""gutenberg: English books of Project Gutenberg, as a stream. A book is a document, so its shuffle buffer is small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from niels_gpt.data.hub_text import describe_stream, streamed
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "gutenberg"


def stream(settings: Settings) -> Iterator[Document]:
    """The books, shuffled in a buffer of `data.gutenberg.shuffle_buffer` unless told otherwise."""
    chosen = settings.data.gutenberg
    return streamed(NAME, chosen, None, chosen.shuffle_buffer)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.gutenberg
    return describe_stream(chosen, None, chosen.shuffle_buffer)
