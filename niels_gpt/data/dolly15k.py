"""dolly15k: Dolly 15k, instructions and answers written by people (CC BY-SA 3.0)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from niels_gpt.data import hub
from niels_gpt.data.types import Chat, Message
from niels_gpt.settings import Settings

NAME = "dolly15k"
SYSTEM = "you are a helpful assistant."


def chats(settings: Settings, split: str) -> Iterator[Chat]:
    """One chat per row: instruction and context, then the response. The cache builder splits them."""
    chosen = settings.data.dolly
    rows = list(hub.load(chosen.dataset_id, split=chosen.split, revision=chosen.revision))
    if chosen.shuffle:
        random.Random(chosen.seed).shuffle(rows)
    for row in rows[: chosen.max_examples]:
        yield to_chat(row, include_system=chosen.include_system)


def to_chat(row: Mapping[str, Any], *, include_system: bool) -> Chat:
    """The chat of one row; ValueError, naming what is missing, if it is no row of Dolly."""
    missing = [key for key in ("instruction", "context", "response") if not isinstance(row.get(key, ""), str)]
    missing += [key for key in ("instruction", "response") if key not in row]
    if missing:
        raise ValueError(f"{NAME}: a row has no text in {', '.join(missing)}; its columns are {', '.join(row)}")
    context = row.get("context", "")
    asked = row["instruction"] + (f"\n\ncontext:\n{context}" if context.strip() else "")
    system = (Message("system", SYSTEM),) if include_system else ()
    return Chat((*system, Message("user", asked), Message("assistant", row["response"])), NAME)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the chats of this source depend on."""
    chosen = settings.data.dolly
    return {
        "dataset_name": chosen.dataset_id,
        "dataset_revision": hub.commit_of(chosen.dataset_id, chosen.revision),
        "dataset_split": chosen.split,
        "split_rule": "by the cache builder",
        "include_system": chosen.include_system,
        "shuffle_seed": chosen.seed if chosen.shuffle else None,
        "max_examples": chosen.max_examples,
    }
