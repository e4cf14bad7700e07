"""The records that flow from sources to caches, training and chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Document:
    """One text of a source; `name` says which, where the source has names for its texts, such as paths."""

    text: str
    source: str
    name: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; roles are {', '.join(ROLES)}")


@dataclass(frozen=True)
class Chat:
    """One conversation of a source."""

    messages: tuple[Message, ...]
    source: str

    @classmethod
    def from_dicts(cls, messages: Sequence[Mapping[str, Any]], source: str) -> Chat:
        """From the JSON form, a list of {"role", "content"}."""
        return cls(tuple(Message(m["role"], m["content"]) for m in messages), source)
