"""The sources of text and chats by name: a source is one short file in this folder and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from niels_gpt.data import (
    chitchat,
    dolly15k,
    fineweb_edu,
    gutenberg,
    jsonl,
    oasst1,
    primer_source,
    roam,
    text,
    wiki_summaries,
    wikitext,
)
from niels_gpt.data.types import Chat, Document
from niels_gpt.settings import Settings
from niels_gpt.settings.legacy import RENAMED_SOURCES

Documents = Callable[[Settings, str], Iterator[Document]]  # split: "train" | "val"
Chats = Callable[[Settings, str], Iterator[Chat]]


@dataclass(frozen=True)
class Source:
    """Where the documents of a split, or its chats, come from.

    `describe(settings, phase)` returns what they depend on as JSON values: dataset_name, split_rule, hashes of files,
    versions. Equal descriptions mean equal data. A source that `splits_chats` knows which chats are for validation;
    another yields all of them for the split "all", and the cache builder splits them.
    """

    name: str
    describe: Callable[[Settings, str], dict[str, Any]]
    documents: Documents | None = None
    stream: Callable[[Settings], Iterator[Document]] | None = None
    chats: Chats | None = None
    splits_chats: bool = True
    ends_documents: bool = True
    optional: bool = False  # a mix does without it when its cache is missing
    forget: Callable[[], None] | None = None  # lets go of text that is kept to be read again
    from_hub: bool = False  # the Hugging Face hub has it


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "chitchat",
            chitchat.describe,
            documents=chitchat.documents,
            chats=chitchat.chats,
            forget=chitchat.forget,
        ),
        Source("primer", primer_source.describe, documents=primer_source.documents, chats=primer_source.chats),
        Source("roam", roam.describe, documents=roam.documents, optional=True),
        Source("text", text.describe, documents=text.documents),
        Source("wikitext", wikitext.describe, documents=wikitext.documents, ends_documents=False, from_hub=True),
        Source("fineweb_edu", fineweb_edu.describe, stream=fineweb_edu.stream, ends_documents=False, from_hub=True),
        Source("gutenberg", gutenberg.describe, stream=gutenberg.stream, ends_documents=False, from_hub=True),
        Source("wiki_summaries", wiki_summaries.describe, documents=wiki_summaries.documents),
        Source("dolly15k", dolly15k.describe, chats=dolly15k.chats, splits_chats=False, from_hub=True),
        Source("oasst1", oasst1.describe, chats=oasst1.chats, splits_chats=False, from_hub=True),
        Source("jsonl", jsonl.describe, chats=jsonl.chats, splits_chats=False),
    )
}


def canonical_name(name: str) -> str:
    """The name of a source behind an old one."""
    return RENAMED_SOURCES.get(name, name)


def get_source(name: str) -> Source:
    """The source of this name, or old name; ValueError if there is none."""
    name = canonical_name(name)
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; sources are {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


def forget_text() -> None:
    """Let go of text that sources keep: once there are caches, nobody reads it again, and training needs the memory."""
    for source in SOURCES.values():
        if source.forget is not None:
            source.forget()


def is_optional(name: str) -> bool:
    """Whether a mix goes on without this source when its cache is missing."""
    return name in SOURCES and SOURCES[name].optional
