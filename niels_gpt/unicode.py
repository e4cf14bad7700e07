"""Characters that text may hold and that UTF-8 or SentencePiece cannot take as they are."""

from __future__ import annotations

import re

BLANK = "\u2581"  # SentencePiece writes a blank so, and takes a real U+2581 for one
_SURROGATE = re.compile("[\ud800-\udfff]")


def valid_unicode(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which UTF-8 cannot hold."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text
