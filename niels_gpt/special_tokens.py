"""The four sentinels that structure a chat, and the guard that keeps text from posing as one."""

from __future__ import annotations

import re
from typing import TypedDict

_UUID = "84a5023f67d74cf29cc4001becde983c"
SYS_TOKEN = f"<|ngpt_sys_{_UUID}|>"
USR_TOKEN = f"<|ngpt_usr_{_UUID}|>"
ASST_TOKEN = f"<|ngpt_asst_{_UUID}|>"
EOT_TOKEN = f"<|ngpt_eot_{_UUID}|>"

SPECIAL_TOKEN_NAMES = ("sys", "usr", "asst", "eot")
SPECIAL_TOKENS = {"sys": SYS_TOKEN, "usr": USR_TOKEN, "asst": ASST_TOKEN, "eot": EOT_TOKEN}
SPECIAL_TOKEN_IDS = {"sys": 3, "usr": 4, "asst": 5, "eot": 6}  # in every tokenizer this project trains

_LITERAL = re.compile("|".join(re.escape(t) for t in SPECIAL_TOKENS.values()))
_SNIPPET_CHARS = 80


class Collision(TypedDict):
    """A sentinel literal in a text: which, where it starts, and an escaped snippet from there on."""

    token: str
    char_offset: int
    byte_offset: int
    snippet: str


def find_special_collision(text: str) -> Collision | None:
    """The first sentinel literal in `text`: where it starts, and an escaped snippet from there on; None if none."""
    match = _LITERAL.search(text)
    if match is None:
        return None
    start = match.start()
    snippet = text[start : start + _SNIPPET_CHARS].encode("unicode_escape").decode("ascii")[:_SNIPPET_CHARS]
    return {
        "token": match[0],
        "char_offset": start,
        "byte_offset": len(text[:start].encode("utf-8", "surrogatepass")),
        "snippet": snippet,
    }


def assert_no_special_collision(text: str, *, dataset: str, doc_index: int, field: str) -> None:
    """Raise ValueError, naming the document, if `text` contains a sentinel literal."""
    found = find_special_collision(text)
    if found is not None:
        raise ValueError(
            f"special token literal detected in dataset={dataset} doc_index={doc_index} field={field}: "
            f"token={found['token']} byte_offset={found['byte_offset']} snippet={found['snippet']!r}; "
            "remove it from the text: control tokens may only be added by the chat format"
        )
