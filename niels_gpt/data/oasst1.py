"""oasst1: OpenAssistant conversations, rebuilt from trees of messages: every path from a root to a leaf is a thread."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from niels_gpt.data import hub
from niels_gpt.data.types import Chat, Message
from niels_gpt.settings import Settings

NAME = "oasst1"
ENGLISH = "en"
ROLES = {"prompter": "user", "assistant": "assistant"}
COLUMNS = ("message_id", "parent_id", "message_tree_id", "role", "text", "lang")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Thread:
    """One path through a tree. `message_ids` are all nodes of the path; blank messages are not in `messages`."""

    messages: tuple[Message, ...]
    tree_id: str
    leaf_id: str
    message_ids: tuple[str, ...]


def chats(settings: Settings, split: str) -> Iterator[Chat]:
    """One chat per thread, all those with a shared beginning included. The cache builder splits them."""
    chosen = settings.data.oasst1
    rows = hub.load(chosen.dataset_id, split=chosen.split, revision=chosen.revision)
    found = list(threads(rows, english_only=chosen.english_only, max_messages=chosen.max_messages))
    if chosen.shuffle_trees:
        random.Random(chosen.seed).shuffle(found)
    for thread in found[: chosen.take_trees]:
        yield Chat(thread.messages, NAME)


def threads(rows: Iterable[Row], *, english_only: bool, max_messages: int) -> Iterator[Thread]:
    """Every path from a root to a leaf, trees and children in the order of the rows.

    A path is cut at `max_messages` nodes. Messages in another language are left out, and with them all that answers
    them. A path in which someone speaks twice in a row, blank messages aside, or an unknown role speaks, is dropped.
    """
    trees: dict[str, list[Row]] = {}  # roots of every tree
    children: dict[str, list[Row]] = {}
    for row in rows:
        if missing := [column for column in COLUMNS if column not in row]:
            raise ValueError(f"{NAME}: a row has no {', '.join(missing)}; its columns are {', '.join(row)}")
        if english_only and row["lang"] != ENGLISH:
            continue
        if row["parent_id"] is None:
            trees.setdefault(row["message_tree_id"], []).append(row)
        else:
            children.setdefault(row["parent_id"], []).append(row)
    for roots in trees.values():
        for root in roots:
            for path in _paths(root, children, max_messages):
                if thread := _thread(path):
                    yield thread


def _paths(root: Row, children: Mapping[str, list[Row]], max_messages: int) -> Iterator[list[Row]]:
    waiting = [[root]]
    while waiting:
        path = waiting.pop()
        below = children.get(path[-1]["message_id"], []) if len(path) < max_messages else []
        if not below:
            yield path
        waiting += [[*path, child] for child in reversed(below)]


def _thread(path: list[Row]) -> Thread | None:
    messages: list[Message] = []
    for row in path:
        role, text = ROLES.get(row["role"]), (row["text"] or "").strip()
        if role is None:
            return None
        if text:
            if messages and messages[-1].role == role:
                return None
            messages.append(Message(role, text))
    if not messages:
        return None
    ids = tuple(row["message_id"] for row in path)
    return Thread(tuple(messages), path[0]["message_tree_id"], ids[-1], ids)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the chats of this source depend on."""
    chosen = settings.data.oasst1
    return {
        "dataset_name": chosen.dataset_id,
        "dataset_revision": hub.commit_of(chosen.dataset_id, chosen.revision),
        "dataset_split": chosen.split,
        "split_rule": "by the cache builder",
        "english_only": chosen.english_only,
        "max_messages": chosen.max_messages,
        "shuffle_seed": chosen.seed if chosen.shuffle_trees else None,
        "take_trees": chosen.take_trees,
    }
