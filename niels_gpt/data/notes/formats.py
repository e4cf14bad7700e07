"""From the text of a file to its documents, by kind: Markdown, HTML, chat exports and JSON lines, plain text."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from niels_gpt.data.notes.markdown import Blocks, clean_markdown

_TEXT_KEYS = ("text", "content", "message", "body")
_SPEAKER_KEYS = ("role", "from", "sender", "speaker", "author", "name", "user")
_LINE_SPEAKER_KEYS = _SPEAKER_KEYS[:4]  # a text with an author or a name, alone in its line, is no chat
_BREAKS = {  # what an element puts before and after its content
    **dict.fromkeys(
        ("p", "div", "section", "article", "ul", "ol", "table", "blockquote", "dl", "figure"), ("\n\n", "\n\n")
    ),
    **{f"h{n}": ("\n\n" + "#" * n + " ", "\n\n") for n in range(1, 7)},
    **dict.fromkeys(("tr", "dt", "dd", "figcaption", "summary", "title"), ("\n", "\n")),
    "li": ("\n- ", ""),
    "br": ("\n", ""),
    "td": ("", " "),
    "th": ("", " "),
}
_WITHOUT_TEXT = {"script", "style", "noscript", "template", "svg", "iframe", "object", "button", "select", "nav"}


def documents_of(text: str, kind: str, *, clean: bool, blocks: Blocks | None = None) -> Iterator[tuple[str, str]]:
    """(suffix of the name, text) of every document in a file; the suffix is empty where the file is one document.

    Lines of a JSON lines file that hold no text have the empty text.
    """
    if kind == "jsonl":
        yield from json_documents(text)
    elif not clean or kind == "text":
        yield "", text.strip()
    elif kind == "html":
        yield "", html_text(text)
    else:
        yield "", clean_markdown(text, blocks)


# HTML


def html_text(html: str) -> str:
    """What a page says, a line per paragraph, with headings and items marked as in Markdown; '' if it is broken."""
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about pages that look like a file name or like XML
        try:
            page = BeautifulSoup(html, "html.parser")
        except (ParserRejectedMarkup, RecursionError, AssertionError, ValueError):
            return ""
    text = "".join(_html_parts(page))
    text = re.sub(r"[ \t]*\n[ \t]*(?!\ue000)", "\n", text)
    lines = [line if line.startswith("\ue000") else re.sub(r"[ \t]+", " ", line).rstrip() for line in text.split("\n")]
    kept = "\n".join(line for line in lines if line.strip() not in ("-", "#", "##", "###", "####", "#####", "######"))
    return re.sub(r"\n{3,}", "\n\n", kept).replace("\ue000", "").strip()


def _html_parts(page: Any) -> Iterator[str]:
    """Texts and breaks in reading order, without recursion: pages can be nested as deep as they like.

    Lines of preformatted text begin with U+E000, so that their blanks are kept.
    """
    from bs4.element import NavigableString, Tag

    stack: list[Any] = [page]
    while stack:
        node = stack.pop()
        if isinstance(node, Tag):
            if node.name == "pre":
                code = node.get_text().replace("\ue000", "").strip("\n").split("\n")
                yield "\n\n" + "\n".join("\ue000" + line for line in ("```", *code, "```")) + "\n\n"
            elif node.name not in _WITHOUT_TEXT:
                before, after = _BREAKS.get(node.name, ("", ""))
                yield before
                stack.append(after)
                stack.extend(reversed(node.contents))
        elif type(node) is NavigableString:  # not a comment or a doctype, which derive from it
            yield re.sub(r"\s+", " ", node.replace("\ue000", ""))
        elif type(node) is str:
            yield node


# JSON lines


def json_documents(text: str) -> Iterator[tuple[str, str]]:
    """A document per line, named by its number; lines that are one message each are one conversation together."""
    spoken: list[str] = []
    first = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            yield f"#{number}", ""
            continue
        if said := _message(record, _LINE_SPEAKER_KEYS):
            first = first or number
            spoken.append(said)
            continue
        yield f"#{number}", record_text(record)
    if spoken:
        yield f"#{first}", "\n".join(spoken)


def record_text(record: Any) -> str:
    """The text of one record: a string, {"text"}, a chat of a common form, question and answer; '' if none fits."""
    if isinstance(record, str):
        return _sound(record)
    if isinstance(record, list):
        return _conversation(record)
    if not isinstance(record, dict):
        return ""
    for key in ("messages", "conversations", "conversation", "chat", "turns"):
        if isinstance(record.get(key), list):
            return _conversation(record[key])
    if isinstance(record.get("mapping"), dict):
        return _conversation(_thread(record["mapping"], record.get("current_node")))
    for asked, answered in (
        ("instruction", "output"),
        ("prompt", "response"),
        ("prompt", "completion"),
        ("question", "answer"),
    ):
        if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
            parts = (record[asked], record.get("input") or record.get("context") or "", record[answered])
            return "\n\n".join(_sound(part) for part in parts if isinstance(part, str) and part.strip())
    title = _sound(record.get("title", ""))
    body = next((found for key in _TEXT_KEYS if (found := _words(record.get(key)))), "")
    return f"# {title}\n\n{body}" if title and body else body


def _conversation(messages: list[Any]) -> str:
    return "\n".join(said for message in messages if (said := _message(message)))


def _message(record: Any, speaker_keys: Sequence[str] = _SPEAKER_KEYS) -> str:
    """`speaker: what they said`; '' if it is no message."""
    if not isinstance(record, dict):
        return ""
    speaker = next((found for key in speaker_keys if (found := _speaker(record.get(key)))), "")
    said = next((found for key in (*_TEXT_KEYS, "value", "parts") if (found := _words(record.get(key)))), "")
    return f"{speaker}: {said}" if speaker and said else ""


def _speaker(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("role") or value.get("name")
    return " ".join(_sound(value).split())[:80]


def _words(value: Any) -> str:
    """A string, or the strings of a list of parts or of {"parts": [...]} or {"text": ...}."""
    for _ in range(2):
        if isinstance(value, dict):
            value = value.get("parts", value.get("text"))
    if isinstance(value, list):
        texts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else "" for part in value
        ]
        value = "\n".join(part for part in texts if isinstance(part, str))
    return _sound(value)


def _thread(mapping: dict[str, Any], last: Any) -> list[Any]:
    """The messages of an exported chat from its root to its current node; all in order where that is unknown."""
    nodes: list[Any] = []
    seen: set[str] = set()
    while isinstance(last, str) and last in mapping and last not in seen and isinstance(mapping[last], dict):
        seen.add(last)
        nodes.append(mapping[last])
        last = mapping[last].get("parent")
    found = nodes[::-1] or [node for node in mapping.values() if isinstance(node, dict)]
    return [node.get("message") for node in found]


def _sound(value: Any) -> str:
    """A string without blank edges and without halves of surrogate pairs, which have no UTF-8; '' for anything else."""
    return value.strip().encode("utf-8", "ignore").decode() if isinstance(value, str) else ""
