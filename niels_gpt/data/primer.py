"""The chat primer: reading `primer.txt`, splitting it, and reading and writing chat JSONL files.

Two formats hold the same dialogues:

* `primer.txt`, for people and for pretraining on text: blocks of `system: `, `user: ` and `assistant: ` lines,
  one message a line, joined by `DIALOGUE_DELIMITER`;
* `primer.jsonl`, for fine-tuning: one `{"messages": [{"role": ..., "content": ...}, ...]}` object a line.

A message is a plain dict with exactly the keys `role` and `content`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from niels_gpt.data.types import ROLES
from niels_gpt.files import atomic_write, write_text
from niels_gpt.settings import DIALOGUE_DELIMITER

Message = dict[str, str]
Dialogue = list[Message]

_SHOWN = 60  # characters of a name in a message
_UTF8_BOM = b"\xef\xbb\xbf"
_TAG_INSIDE = re.compile(r"\b(?:system|user|assistant):|<\||<dialogue>", re.IGNORECASE)


# primer.txt


def parse_dialogue(block: str, where: str, *, first_line: int = 1) -> Dialogue:
    """Parse one block of `role: content` lines into messages.

    The rules: an optional `system` line first, then `user` and `assistant` in turn, ending with `assistant`; every
    message is one non-empty line without a role tag, `<|` or `<dialogue>` inside.

    Args:
        block: the text between two delimiters.
        where: what to call the block in errors, such as `data/primer.txt, dialogue 3`.
        first_line: the number of the block's first line, so that errors can name a line of the file.

    Raises:
        ValueError: the block breaks a rule; the text names `where`, the line and what to do.
    """
    messages: Dialogue = []
    expected: tuple[str, ...] = ("system", "user")
    number = first_line
    for number, line in enumerate(block.split("\n"), start=first_line):
        role, colon, content = line.partition(":")
        content = content.strip()
        problem = ""
        if not colon or role not in ROLES:
            problem = (
                "a line must start with 'system:', 'user:' or 'assistant:' ('<dialogue>' needs blank lines around it)"
            )
        elif role not in expected:
            problem = f"expected {' or '.join(expected)} here, found {role}"
        elif not content:
            problem = f"the {role} message is empty"
        elif inside := _TAG_INSIDE.search(content):
            problem = f"a message may not contain {inside.group()!r}; reword it"
        if problem:
            raise ValueError(f"{where}, line {number}: {problem}: {line!r}")
        messages.append({"role": role, "content": content})
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}, line {number}: a dialogue must end with an assistant line: {line!r}")
    return messages


def read_primer_txt(path: str | os.PathLike[str]) -> list[Dialogue]:
    """Read every dialogue of a primer text file, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, holds no dialogue, or a block is malformed (file, dialogue and line named).
    """
    raw = Path(path).read_bytes().removeprefix(_UTF8_BOM)
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    dialogues: list[Dialogue] = []
    line = 1
    for piece in text.split(DIALOGUE_DELIMITER):
        block = piece.strip()
        if block:
            blank_before = piece[: len(piece) - len(piece.lstrip())].count("\n")
            where = f"{path}, dialogue {len(dialogues) + 1}"
            dialogues.append(parse_dialogue(block, where, first_line=line + blank_before))
        line += piece.count("\n") + DIALOGUE_DELIMITER.count("\n")
    if not dialogues:
        raise ValueError(f"{path}: no dialogue in it; see data/primer.txt for the format")
    return dialogues


def write_primer_txt(path: str | os.PathLike[str], dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues as primer text, replacing the file in one step.

    Raises:
        ValueError: a dialogue breaks a rule of `parse_dialogue`; the file is left as it was.
    """
    blocks = []
    for index, messages in enumerate(dialogues, start=1):
        blocks.append("\n".join(f"{message['role']}: {message['content']}" for message in messages))
        parse_dialogue(blocks[-1], f"{path}, dialogue {index}")
    write_text(Path(path), DIALOGUE_DELIMITER.join(blocks) + "\n")


def split_primer_text(text: str, *, delimiter: str, val_frac: float, seed: int) -> tuple[str, str]:
    """Split primer text into (train, val) text by whole dialogues.

    Blocks are stripped, empty ones dropped, the rest shuffled with `random.Random(seed)`; the first
    `max(1, int(n * val_frac))` are val. So val holds at least one block even for `val_frac` 0, except that fewer than
    two blocks all go to train.

    Raises:
        ValueError: `val_frac` is outside [0, 1) or `delimiter` is empty.
    """
    if not 0 <= val_frac < 1:
        raise ValueError(f"val_frac must be at least 0 and below 1, got {val_frac}")
    if not delimiter:
        raise ValueError("delimiter must not be empty")
    blocks = [block for piece in text.split(delimiter) if (block := piece.strip())]
    if len(blocks) < 2:
        return delimiter.join(blocks), ""
    random.Random(seed).shuffle(blocks)
    n_val = max(1, int(len(blocks) * val_frac))
    return delimiter.join(blocks[n_val:]), delimiter.join(blocks[:n_val])


# chat JSONL


def parse_chat_line(line: bytes) -> Dialogue:
    """Parse and check one line of a chat JSONL file.

    Raises:
        ValueError: the reason, without a line number (the caller knows it).
    """
    example = decode_line(line)
    if "messages" not in example:
        raise ValueError("the key 'messages' is missing")
    return check_messages(example["messages"])


def decode_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line; ValueError, the reason, if it is none."""
    try:
        example = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not valid JSON for a chat: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits is refused by int(), not by the JSON parser
        raise ValueError(f"not valid JSON for a chat: {error}") from error
    if not isinstance(example, dict):
        raise ValueError(f"expected a JSON object with 'messages', found {json_name(example)}")
    return example


def check_messages(messages: object) -> Dialogue:
    """The messages themselves, if they are a chat to learn from; ValueError, the reason, otherwise."""
    if not isinstance(messages, list):
        raise ValueError(f"'messages' must be a list, found {json_name(messages)}")
    if not messages:
        raise ValueError("'messages' must not be empty")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant message, so there is nothing to learn from; add one")
    return messages


def _check_message(message: object, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object, found {json_name(message)}")
    if set(message) != {"role", "content"}:
        found = names_of(message)
        raise ValueError(f"{name} must have exactly the keys 'role' and 'content', found {found}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        shown = ascii(role)[:_SHOWN] if isinstance(role, str) else json_name(role)
        raise ValueError(f"{name}: role must be one of {', '.join(ROLES)}, found {shown}")
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a string, found {json_name(content)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: content holds half of a surrogate pair (character {error.start + 1})") from error


def kind_of(reason: str) -> str:
    """A reason without what is particular to its line, for counting."""
    general = re.sub(r"^messages\[\d+\]( |: )", lambda found: "a message" + ("'s " if ":" in found[1] else " "), reason)
    return re.split(r": |, found | \(", general, maxsplit=1)[0]


def names_of(example: dict[str, Any]) -> str:
    """The keys of a JSON object, in a few words."""
    shown = [ascii(key)[:_SHOWN] for key in sorted(example)[:8]]
    return ", ".join(shown + (["..."] if len(example) > 8 else [])) or "none"


def json_name(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def iter_chat_jsonl_lenient(path: str | os.PathLike[str]) -> Iterator[tuple[int, Dialogue | None, str | None]]:
    """Yield `(line_number, messages, None)` for every good line and `(line_number, None, reason)` for every bad one.

    For builders that drop bad examples and count them.
    """
    for number, line in lines_of(path):
        try:
            messages = parse_chat_line(line)
        except ValueError as error:
            yield number, None, str(error)
        else:
            yield number, messages, None


def lines_of(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of every line that is not blank, without its end and a leading byte order mark.

    Lines are read one at a time, so the file may be larger than memory.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_UTF8_BOM)
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def read_chat_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Dialogue]]:
    """Yield `(line_number, messages)` for every example of a chat JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the first bad line, as `PATH: line N: reason`, or a file without any example.
    """
    empty = True
    for number, messages, reason in iter_chat_jsonl_lenient(path):
        if messages is None:
            raise ValueError(f"{path}: line {number}: {reason}")
        empty = False
        yield number, messages
    if empty:
        raise ValueError(f"{path}: no example in it; each line must be an object such as {{'messages': [...]}}")


def write_chat_jsonl(path: str | os.PathLike[str], dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues as chat JSONL: whatever goes wrong, `path` holds its old bytes or all the new ones."""
    with atomic_write(Path(path)) as file:
        for messages in dialogues:
            file.write((json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode("utf-8"))
