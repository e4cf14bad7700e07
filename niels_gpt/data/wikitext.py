"""wikitext: WikiText-103 (raw), paragraphs of good Wikipedia articles. Its own validation split is val."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from niels_gpt.data import hub
from niels_gpt.data.hub_text import describe_rows, limited, text_of
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "wikitext"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """The rows of a split as they are, except blank ones."""
    chosen = settings.data.wikitext
    rows = hub.load(
        chosen.dataset_id,
        config=chosen.config,
        split=chosen.val_split if split == "val" else chosen.train_split,
        revision=chosen.revision,
    )
    texts = (text_of(row, chosen.dataset_id) for row in rows)
    return limited((Document(text, NAME) for text in texts if text.strip()), chosen)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.wikitext
    return {
        **describe_rows(chosen, chosen.config),
        "split_rule": f"val is the split {chosen.val_split}, train the split {chosen.train_split}",
    }
