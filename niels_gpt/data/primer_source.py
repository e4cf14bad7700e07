"""primer: the shipped dialogues as a source; `primer.txt` for pretraining, `primer.jsonl` for fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt import paths
from niels_gpt.data.primer import read_chat_jsonl, split_primer_text
from niels_gpt.data.text import read_text
from niels_gpt.data.types import Chat, Document
from niels_gpt.files import sha256_file
from niels_gpt.settings import Settings

NAME = "primer"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """One document per dialogue of primer.txt, with its role tags."""
    chosen = settings.data.primer
    text = read_text(_find(chosen.path, "data.primer.path"))
    train, val = split_primer_text(text, delimiter=chosen.delimiter, val_frac=chosen.val_frac, seed=chosen.seed)
    for block in (val if split == "val" else train).split(chosen.delimiter):
        if block:
            yield Document(block, NAME)


def chats(settings: Settings, split: str) -> Iterator[Chat]:
    """The examples of primer.jsonl, in the order of the file."""
    chosen = settings.data.primer
    examples = [messages for _, messages in read_chat_jsonl(find_jsonl(settings))]
    held_out = val_indices(len(examples), chosen.val_frac, chosen.seed)
    for i, messages in enumerate(examples):
        if (i in held_out) == (split == "val"):
            yield Chat.from_dicts(messages, NAME)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.primer
    path = find_jsonl(settings) if phase == "sft" else _find(chosen.path, "data.primer.path")
    return {
        "dataset_name": NAME,
        "split_rule": f"by dialogue, val_frac={chosen.val_frac}, seed={chosen.seed}",
        "delimiter": chosen.delimiter,
        "files": {path.name: sha256_file(path)},
    }


def val_indices(n: int, val_frac: float, seed: int) -> set[int]:
    """Which of n examples of primer.jsonl are for validation: int(n * val_frac) of them, so possibly none."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return set(order[: int(n * val_frac)])


def find_jsonl(settings: Settings) -> Path:
    """primer.jsonl: under the current directory, else the one that comes with the project."""
    return _find(settings.data.primer.jsonl_path, "data.primer.jsonl_path")


def _find(path: str, setting: str) -> Path:
    found = paths.find(path)
    if found is None:
        raise FileNotFoundError(f"there is no primer file {path}; set {setting} to where it is")
    return found
