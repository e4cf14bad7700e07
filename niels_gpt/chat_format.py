"""The chat contract: how conversations become token ids, labels and prompts, and how ids become a reply.

Token form (SentencePiece tokenizers): every message is its role's sentinel id, the ids of its content and the end id.
Only this module puts sentinels into sequences. Training, chat and exports share the one renderer, so a prompt is by
construction the beginning of what was trained on.

Text form (byte tokenizers of the first published models): `role: content` lines, ending in `assistant: `.

Other templates, and what to do with a dropped message, are not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from niels_gpt.data.types import ROLES, Message
from niels_gpt.model.loss import IGNORED
from niels_gpt.tokenizer import Tokenizer

AnyMessage = Message | Mapping[str, str]  # the record, or its JSON form

_SENTINEL_OF = {"system": "sys", "user": "usr", "assistant": "asst"}
_TAG = re.compile(rf"(?:\A|(?<=\n))({'|'.join(ROLES)}): ")  # only at the start of a line
_REPLY_TAG = "assistant: "


@dataclass(frozen=True)
class Prompt:
    """Ids to continue from, and how many of the oldest messages had to be left out."""

    ids: list[int]
    dropped: int


class ChatFormat(Protocol):
    """What a chat needs to know of a model's chat form."""

    @property
    def stop_ids(self) -> frozenset[int]: ...  # any of them ends the reply
    @property
    def banned_ids(self) -> tuple[int, ...]: ...  # never to be sampled
    @property
    def text_stops(self) -> tuple[str, ...]: ...  # any of these in the generated text ends the reply

    def encode_prompt(self, messages: Sequence[AnyMessage], *, context: int, max_new_tokens: int) -> Prompt:
        """Ids that ask for the next assistant message, short enough for a context of `context` tokens.

        Room for `min(max_new_tokens, context // 2)` new tokens is kept by leaving out the oldest turns (a user message
        and what follows it); system messages and the last user turn always stay.

        Raises:
            ValueError: nothing to answer, or what must stay leaves no room for even one new token.
        """


class TokenChat:
    """Sentinel turns; the reply ends with the end id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        sentinels = sentinel_ids(tokenizer)
        self._tokenizer = tokenizer
        self.stop_ids = frozenset({sentinels["eot"]})
        self.banned_ids = tuple(sentinels[name] for name in _SENTINEL_OF.values())
        self.text_stops: tuple[str, ...] = ()

    def encode_prompt(self, messages: Sequence[AnyMessage], *, context: int, max_new_tokens: int) -> Prompt:
        """As in `ChatFormat`."""
        records = as_messages(messages)
        turns = [ids for ids, _ in _render_each(self._tokenizer, records)]
        return _fit(records, turns, _reply_start(self._tokenizer), context, max_new_tokens)


class TextChat:
    """`role: content` lines; the reply ends where the model starts another line with a role."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids: frozenset[int] = frozenset()
        self.banned_ids: tuple[int, ...] = ()
        self.text_stops = tuple(f"\n{role}: " for role in ("user", "system", "assistant"))

    def encode_prompt(self, messages: Sequence[AnyMessage], *, context: int, max_new_tokens: int) -> Prompt:
        """As in `ChatFormat`; lines of a message that pose as another message are indented."""
        records = [Message(m.role, _without_tags(m.content)) for m in as_messages(messages)]
        if records and records[-1] == Message("assistant", ""):
            records.pop()
        turns = [self._tokenizer.encode(_text_turn(message)) for message in records]
        return _fit(records, turns, self._tokenizer.encode(_REPLY_TAG), context, max_new_tokens)


def chat_format_for(tokenizer: Tokenizer) -> ChatFormat:
    """The form that models with this tokenizer were trained on."""
    return TextChat(tokenizer) if tokenizer.kind == "byte" else TokenChat(tokenizer)


def as_messages(messages: Sequence[AnyMessage]) -> list[Message]:
    """Records from records or {"role", "content"} mappings; ValueError for an unknown role or a missing key."""
    records = []
    for message in messages:
        if not isinstance(message, Message):
            if "role" not in message or "content" not in message:
                raise ValueError(f"a message needs the keys 'role' and 'content', found {', '.join(message) or 'none'}")
            message = Message(message["role"], message["content"])
        records.append(message)
    return records


# token form


def render(tokenizer: Tokenizer, messages: Sequence[AnyMessage]) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its labels, equally long and not shifted.

    A label is the id where an assistant wrote it (content and the end id, also of an empty reply) and -100 elsewhere.
    """
    return _joined(_render_each(tokenizer, as_messages(messages)))


def render_batch(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[AnyMessage]]
) -> list[tuple[list[int], list[int]]]:
    """`render` of each conversation; all texts are encoded together, on all cores."""
    records = [as_messages(messages) for messages in conversations]
    encoded = iter(tokenizer.encode_batch([message.content for messages in records for message in messages]))
    return [
        _joined([_rendered(tokenizer, message, ids) for message, ids in zip(messages, encoded, strict=False)])
        for messages in records
    ]


def _joined(turns: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for turn_ids, turn_labels in turns:
        ids += turn_ids
        labels += turn_labels
    return ids, labels


def format_chat_ids(tokenizer: Tokenizer, messages: Sequence[AnyMessage]) -> list[int]:
    """Ids of whole messages."""
    return render(tokenizer, messages)[0]


def format_prompt_ids(tokenizer: Tokenizer, messages: Sequence[AnyMessage]) -> list[int]:
    """Ids of whole messages and the sentinel that starts the reply."""
    return format_chat_ids(tokenizer, messages) + _reply_start(tokenizer)


def extract_reply_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Ids after the last assistant sentinel, up to the first end id; [] if there is no such sentinel."""
    sentinels = sentinel_ids(tokenizer)
    ids = list(ids)
    if sentinels["asst"] not in ids:
        return []
    reply = ids[len(ids) - ids[::-1].index(sentinels["asst"]) :]
    return reply[: reply.index(sentinels["eot"])] if sentinels["eot"] in reply else reply


def _render_each(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each message."""
    return [_rendered(tokenizer, message, tokenizer.encode(message.content)) for message in messages]


def _rendered(tokenizer: Tokenizer, message: Message, content: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a message whose content has these ids."""
    sentinels = sentinel_ids(tokenizer)
    start, written = sentinels[_SENTINEL_OF[message.role]], [*content, sentinels["eot"]]
    supervised = written if message.role == "assistant" else [IGNORED] * len(written)
    return [start, *written], [IGNORED, *supervised]


def _reply_start(tokenizer: Tokenizer) -> list[int]:
    return [sentinel_ids(tokenizer)[_SENTINEL_OF["assistant"]]]


def sentinel_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the four sentinels by name; ValueError for a byte tokenizer, which has none."""
    ids = tokenizer.special_token_ids()
    if not ids:
        raise ValueError(f"a {tokenizer.kind} tokenizer has no sentinels; its models chat in text form")
    return ids


# text form


def format_chat(messages: Sequence[AnyMessage]) -> str:
    """`role: content` lines and the final `assistant: `; a last assistant message without content is that one."""
    records = as_messages(messages)
    if records and records[-1] == Message("assistant", ""):
        records.pop()
    return "".join(map(_text_turn, records)) + _REPLY_TAG


def extract_assistant_reply(text: str) -> str:
    """The last assistant reply in a transcript that is not empty, stripped.

    If all are empty, says `(no reply)` and returns "".

    Raises:
        ValueError: no line starts with `assistant: `.
    """
    _, *pieces = _TAG.split(text)  # role, content, role, content, ...
    replies = [content.strip() for role, content in zip(pieces[::2], pieces[1::2], strict=True) if role == "assistant"]
    if not replies:
        raise ValueError("no line of the generated text starts with 'assistant: ', so there is no reply in it")
    last = next((reply for reply in reversed(replies) if reply), "")
    if not last:
        print("(no reply)")
    return last


def _text_turn(message: Message) -> str:
    return f"{message.role}: {message.content}\n"


def _without_tags(content: str) -> str:
    """Indent lines that pose as another message, so that a role cannot be forged from inside one."""
    return re.sub(rf"\n(?=(?:{'|'.join(ROLES)}): )", "\n ", content)


# both


def _fit(
    messages: Sequence[Message], turns: list[list[int]], reply_start: list[int], context: int, max_new_tokens: int
) -> Prompt:
    """Join `turns` (the ids of each message), without the oldest ones that do not fit."""
    if not messages:
        raise ValueError("there is no message to answer; a prompt needs at least one")
    kept = [True] * len(messages)
    length = sum(map(len, turns)) + len(reply_start)
    budget = context - min(max_new_tokens, context // 2)
    for turn in _droppable_turns(messages):
        if length <= budget:
            break
        for index in turn:
            kept[index] = False
            length -= len(turns[index])
    if length >= context:
        raise ValueError(
            f"prompt length {length} exceeds model capacity {context} (one position must stay free for the reply); "
            "shorten the last message or the system prompt"
        )
    ids = [i for turn, keep in zip(turns, kept, strict=True) if keep for i in turn]
    return Prompt(ids + reply_start, kept.count(False))


def _droppable_turns(messages: Sequence[Message]) -> list[list[int]]:
    """Indices of the messages of each turn but the last, oldest first; system messages belong to no turn."""
    turns: list[list[int]] = [[]]
    for index, message in enumerate(messages):
        if message.role == "user":
            turns.append([])
        if message.role != "system":
            turns[-1].append(index)
    return [turn for turn in turns[:-1] if turn]
