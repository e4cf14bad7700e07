"""jsonl: your own chats, one JSON object a line, in any of three common forms.

    {"messages": [{"role": "user", "content": "..."}, ...]}            as in primer.jsonl
    {"conversations": [{"from": "human", "value": "..."}, ...]}        as in ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}            as in Alpaca; input and system may be missing

Each line is recognised by its keys, and others of its keys are ignored. How many lines had which form, and which were
dropped why, is said at the build and kept in meta.json. What no cache may hold, a message that spells a special token,
is a bad line too: it is out before conversations are split, and cannot be all that validation has.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from niels_gpt.data.primer import Dialogue, check_messages, decode_line, json_name, kind_of, lines_of, names_of
from niels_gpt.data.types import Chat
from niels_gpt.files import sha256_file
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import find_special_collision

NAME = "jsonl"
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
SHOWN_LINES = 5


@dataclass
class Report:
    """What the lines of the files were. `lines` = the sum of `forms` and of all `dropped`."""

    lines: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> "FILE: line N" of every such line

    def drop(self, reason: str, where: str) -> None:
        """Count a line that is left out; `where` is its place."""
        self.dropped.setdefault(kind_of(reason), []).append(where)

    def __str__(self) -> str:
        parts = [f"{self.lines:,} lines", *(f"{n:,} of the form {form}" for form, n in sorted(self.forms.items()))]
        for reason, places in sorted(self.dropped.items()):
            shown = ", ".join(places[:SHOWN_LINES]) + (", ..." if len(places) > SHOWN_LINES else "")
            parts.append(f"{len(places):,} dropped, {reason} ({shown})")
        return "; ".join(parts)


def chats(settings: Settings, split: str) -> Iterator[Chat]:
    """One chat per line, in order; the cache builder splits them. A report goes to stderr at the end.

    Raises:
        FileNotFoundError: there is no such file, or no *.jsonl in the folder.
        ValueError: a line that is no chat, as `PATH: line N: reason`, unless `data.jsonl.skip_bad` is set; or no line
            is one, with what they are instead.
    """
    report = Report()
    for path in find_files(settings):
        for where, messages, reason in parse_file(path, report):
            if messages is not None:
                yield Chat.from_dicts(messages, NAME)
            elif not settings.data.jsonl.skip_bad:
                raise ValueError(f"{where}: {reason}; correct it, or set data.jsonl.skip_bad to leave such lines out")
    if not report.forms:
        raise ValueError(f"{settings.data.jsonl.path} has no conversation to train on: {report}")
    print(f"{NAME}: {report}", file=sys.stderr)


def parse_file(path: Path, report: Report) -> Iterator[tuple[str, Dialogue | None, str | None]]:
    """(place, messages, None) of every line that is a chat, (place, None, reason) of every other; adds to `report`."""
    for number, line in lines_of(path):
        where = f"{path}: line {number}"
        report.lines += 1
        try:
            form, messages = parse_line(line)
        except ValueError as error:
            report.drop(str(error), where)
            yield where, None, str(error)
        else:
            report.forms[form] += 1
            yield where, messages, None


def parse_line(line: bytes) -> tuple[str, Dialogue]:
    """The form of a line and its messages; ValueError, the reason, if it is no chat to learn from."""
    form, messages = _recognised(decode_line(line))
    for index, message in enumerate(messages):
        if collision := find_special_collision(message["content"]):
            raise ValueError(f"messages[{index}] spells a special token: {collision['token']}")
    return form, messages


def _recognised(example: dict[str, Any]) -> tuple[str, Dialogue]:
    if "messages" in example:
        return "messages", check_messages(_only(example["messages"], "role", "content"))
    if "conversations" in example:
        return "conversations", check_messages(_only(example["conversations"], "from", "value"))
    if "instruction" in example and "output" in example:
        return "instruction", check_messages(_instruction(example))
    raise ValueError(f"none of the keys messages, conversations, or instruction and output: found {names_of(example)}")


def _only(messages: object, role: str, content: str) -> object:
    """Messages under our two keys, where they have these; what is wrong with others is for `check_messages` to say."""
    if not isinstance(messages, list):
        return messages
    return [
        {"role": _speaker(message[role]), "content": message[content]}
        if isinstance(message, dict) and role in message and content in message
        else message
        for message in messages
    ]


def _speaker(name: object) -> object:
    return SPEAKERS.get(name, name) if isinstance(name, str) else name


def _instruction(example: dict[str, Any]) -> object:
    given = {key: example.get(key) or "" for key in ("system", "instruction", "input", "output")}
    for key, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a string, found {json_name(value)}")
    if not given["instruction"].strip() or not given["output"].strip():
        raise ValueError("instruction or output is blank")
    asked = given["instruction"] + (f"\n\n{given['input']}" if given["input"].strip() else "")
    system = [{"role": "system", "content": given["system"]}] if given["system"].strip() else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": given["output"]}]


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the chats of this source depend on, and what its lines are."""
    report, paths = Report(), find_files(settings)
    for path in paths:
        for _ in parse_file(path, report):
            pass
    return {
        "dataset_name": NAME,
        "split_rule": "by the cache builder",
        "lines": report.lines,
        "forms": dict(sorted(report.forms.items())),
        "dropped_lines": {reason: len(places) for reason, places in sorted(report.dropped.items())},
        "skip_bad": settings.data.jsonl.skip_bad,
        "files": {path.name: sha256_file(path) for path in paths},
    }


def find_files(settings: Settings) -> list[Path]:
    """The file of `data.jsonl.path`, or every *.jsonl directly in that folder, sorted."""
    path = Path(settings.data.jsonl.path)
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise FileNotFoundError(f"there is no chat file {path}; set data.jsonl.path to your file or folder of *.jsonl")
    return found
