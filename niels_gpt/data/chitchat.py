"""chitchat: human small talk from the package `chitchat-dataset` (MIT), as text and as chats.

Two people talk about a prompt; many dialogues share a prompt, so the split is by prompt: what is said about a
validation prompt is never in train. A turn of the package is a list of utterances by one sender.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt.data.types import Chat, Document, Message
from niels_gpt.files import sha256_file
from niels_gpt.settings import Settings

NAME = "chitchat"
MIN_CHAT_TURNS = 4

Turn = tuple[str, str]  # sender, text
Turns = list[Turn]


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """One document per dialogue of at least two turns, one turn a line."""
    for turns in _dialogues(settings, split):
        yield Document("\n".join(text for _, text in turns), NAME)


def chats(settings: Settings, split: str) -> Iterator[Chat]:
    """Dialogues of at least four turns in which two people strictly alternate, as user and assistant.

    Who speaks first is the user. A long dialogue becomes several chats of at most `data.chitchat.max_turns` turns, so
    that each fits a model's context from its first turn. A last turn of the user, which nobody answered, is left out.
    """
    most = settings.data.chitchat.max_turns // 2 * 2
    for turns in _dialogues(settings, split):
        senders = [sender for sender, _ in turns]
        alternate = senders[0] != senders[1] and all(sender == senders[i % 2] for i, sender in enumerate(senders))
        if alternate and len(turns) >= MIN_CHAT_TURNS:
            answered = turns[: len(turns) // 2 * 2]
            for first in range(0, len(answered), most):
                part = enumerate(text for _, text in answered[first : first + most])
                yield Chat(tuple(Message(("user", "assistant")[i % 2], text) for i, text in part), NAME)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    path = _dataset_path()
    chosen = settings.data.chitchat
    return {
        "dataset_name": "chitchat-dataset",
        "dataset_version": importlib.metadata.version("chitchat-dataset"),
        "split_rule": f"by prompt, {chosen.val_prompts} prompts are val, seed={chosen.split_seed}",
        **({"max_turns": chosen.max_turns} if phase == "sft" else {}),
        "files": {path.name: sha256_file(path)},
    }


def val_prompts(prompts: set[str], settings: Settings) -> set[str]:
    """The prompts whose dialogues are for validation, drawn by seed from all of them."""
    chosen = settings.data.chitchat
    if chosen.val_prompts >= len(prompts):
        raise ValueError(
            f"data.chitchat.val_prompts is {chosen.val_prompts}, but there are only {len(prompts)} prompts; "
            "lower it so that some are left to train on"
        )
    return set(random.Random(chosen.split_seed).sample(sorted(prompts), chosen.val_prompts))


def _dialogues(settings: Settings, split: str) -> Iterator[Turns]:
    path = _dataset_path()
    dialogues = _read(path, path.stat().st_mtime_ns)
    held_out = val_prompts({prompt for prompt, _ in dialogues}, settings)
    for prompt, turns in dialogues:
        if (prompt in held_out) == (split == "val") and len(turns) >= 2:
            yield turns


@functools.lru_cache(maxsize=1)  # a quickstart asks for them ten times
def _read(path: Path, changed_at: int) -> list[tuple[str, Turns]]:
    """(prompt, turns that say something) of every dialogue; the prompt of those that have none is ""."""
    dialogues = json.loads(path.read_bytes()).values()
    return [(d.get("prompt") or "", [t for group in d["messages"] if (t := _turn(group))[1]]) for d in dialogues]


def forget() -> None:
    """Let go of the dialogues that were read."""
    _read.cache_clear()


def _turn(group: list[dict[str, str]]) -> Turn:
    text = " ".join(" ".join(utterance["text"] for utterance in group).split())
    return (sys.intern(group[0]["sender"]) if group else "", text)


def _dataset_path() -> Path:
    try:
        path = Path(str(importlib.resources.files("chitchat_dataset"))) / "dataset.json"
    except ModuleNotFoundError:
        raise ValueError(
            "the source chitchat needs the package chitchat-dataset; install it with: pip install chitchat-dataset"
        ) from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall it with: pip install --force-reinstall chitchat-dataset")
    return path
