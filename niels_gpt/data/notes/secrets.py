"""Finding what must not be learned: keys, tokens, passwords, e-mail addresses, phone and card numbers.

The patterns of keys are those of detect-secrets, used directly because several of its plugins report only a part of
what they matched; phone numbers are found by phonenumbers. Everything else here exists to keep ordinary prose as it is:
dates, ISBNs, years, colours, versions and sums are not secrets.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple, cast

# fmt: off
PLUGINS = (
    "artifactory", "aws", "azure_storage_key", "basic_auth", "cloudant", "discord", "github_token", "gitlab_token",
    "ibm_cloud_iam", "ibm_cos_hmac", "jwt", "mailchimp", "npm", "openai", "pypi_token", "sendgrid", "slack",
    "softlayer", "square_oauth", "stripe", "telegram_token", "twilio",
)
# fmt: on
_SUSPECT = re.compile(r"\d\D{0,3}\d\D{0,3}\d\D{0,3}\d|[:=@]|\S{16}")
_REST = re.compile(r"[A-Za-z0-9_-]*")
_PIECE, _LONGEST = 2000, 500  # characters of a line looked at together, and of a key that the plugins know
_LONG = re.compile(r"\S{12}")  # the shortest key, with what belongs to it
_PRIVATE_KEY = re.compile(r"-----BEGIN [^\n]{0,40}PRIVATE KEY[^\n]{0,40}?-----")
_PRIVATE_KEY_END = re.compile(r"-----END [^\n]{0,40}PRIVATE KEY[^\n]{0,40}?-----")
_PRIVATE_KEY_BODY = re.compile(r"(?:\n[ \t>]*[A-Za-z0-9+/=]{16,200})*")  # of one without an end
_PRIVATE_KEY_LIMIT = 20_000
_NEWER_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20,}|github_pat_[A-Za-z0-9_]{22,}|hf_[A-Za-z0-9]{30,}|AIza[A-Za-z0-9_-]{35}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"
    r"|[sr]k_test_[A-Za-z0-9]{24,}|xapp-[A-Za-z0-9-]{20,}|npm_[A-Za-z0-9]{36}|ya29\.[A-Za-z0-9_-]{20,})"
)
_PASSWORD = re.compile(
    r"(?i:\b(?:[a-z0-9]{1,20}[_-]){0,4}(?P<word>pass(?:word|phrase|wd|code)?|pwd|secret|token|pin(?: code)?"
    r"|(?:api|access|secret|auth|private)[_ -]?key|client[_ -]?secret)\b)[\"'`*]{0,3} {0,3}(?::=|=>|[:=])[*]{0,2} {0,3}"
    r"(?P<quote>[\"'`]?)(?P<value>[^\s\"'`]{4,200})(?P=quote)"
)
_RANDOM = re.compile(r"(?<![\w/+=.-])[A-Za-z0-9_+-]{24,512}={0,2}(?![\w/+.-])")
_RANDOM_BITS = ((32, 4.5), (24, 4.2))  # entropy a character from a length on: random letters have more, names less
_ESCAPED = re.compile(r"\\_")
_EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_IN_ADDRESS = re.compile(r"://[^\s/@]*:\Z")  # what precedes a password in an address, and a host after it
_CARD = re.compile(
    r"(?<![\w.+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-]|\.\d)"
)
_MAYBE_PHONES = re.compile(r"(?<![\w.])[+(]?\d(?:[ \t()./+-]{0,3}\d){6,60}\)?(?!\w)")
_PHONE_WORD = re.compile(
    r"(?i)(?:phone|mobile|cell|tel|fax|call|whatsapp|sms|handy|telefon)\W{0,4}(?:\w+\W{1,3}){0,2}\Z"
)


class Found(NamedTuple):
    """A secret: where it is in a text, and its kind. The secret itself is never kept."""

    start: int
    end: int
    kind: str


def mask(text: str, region: str | None) -> tuple[str, dict[str, int]]:
    """The text with every secret replaced by its kind in brackets, and how many of each kind there were.

    `region`: the country (`US`, `DE`) whose national phone numbers are meant too; None for international ones only.
    """
    counts: dict[str, int] = {}
    parts, end = [], 0
    for found in find(text, region):
        parts += [text[end : found.start], f"[{found.kind}]"]
        end = found.end
        counts[found.kind] = counts.get(found.kind, 0) + 1
    return "".join([*parts, text[end:]]), counts


def find(text: str, region: str | None) -> list[Found]:
    """The secrets of a text in order, also those whose underscores Markdown has escaped (`anna\\_k@example.org`)."""
    escaped = [match.start() - n for n, match in enumerate(_ESCAPED.finditer(text))]  # where they are without the \\
    return [
        Found(start + bisect_left(escaped, start), end + bisect_left(escaped, end), kind)
        for start, end, kind in _find(text.replace(r"\_", "_") if escaped else text, region)
    ]


def _find(text: str, region: str | None) -> list[Found]:
    """Where two overlap they are one, of the kind that comes first in `_ALL`."""
    spans = [(*span, 0) for span in _private_keys(text)]
    start = 0
    for line in text.splitlines(keepends=True):
        if _SUSPECT.search(line):  # most lines are not, and patterns cost time
            for rank, (_, finder) in enumerate(_ALL):
                spans += [(start + first, start + last, rank) for first, last in finder(line, region)]
        start += len(line)
    merged: list[tuple[int, int, int]] = []
    for first, last, rank in sorted(spans):
        if merged and first < merged[-1][1]:
            before = merged.pop()
            merged.append((before[0], max(before[1], last), min(before[2], rank)))
        elif first < last:
            merged.append((first, last, rank))
    return [Found(first, last, _ALL[rank][0]) for first, last, rank in merged]


Span = tuple[int, int]


def _spans(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    return (match.span() for match in pattern.finditer(text))


def _private_keys(text: str) -> Iterator[Span]:
    """The only secrets of many lines."""
    end = 0
    for begins in _PRIVATE_KEY.finditer(text):
        if begins.start() >= end:
            ends = _PRIVATE_KEY_END.search(text, begins.end(), begins.end() + _PRIVATE_KEY_LIMIT)
            ends = ends or _PRIVATE_KEY_BODY.match(text, begins.end())
            end = ends.end() if ends else begins.end()
            yield begins.start(), end


def _keys(line: str, region: str | None) -> Iterator[Span]:
    if not _LONG.search(line):
        return
    yield from _spans(_NEWER_TOKENS, line)
    for start in range(0, len(line), _PIECE - _LONGEST):  # some plugins take time in proportion to the square
        piece = line[start : start + _PIECE]
        for name, pattern in _plugin_patterns():
            for match in pattern.finditer(piece):
                if name == "artifactory" and not any(map(str.isdigit, match.group())):
                    continue  # APARTMENTS and other shouted words begin like one of its keys
                first, last = match.span(1 if name == "basic_auth" else 0)
                rest = _REST.match(line, start + last)  # patterns of a fixed length end too early in a longer key
                yield start + first, rest.end() if rest and name != "basic_auth" else start + last
        if start + _PIECE >= len(line):
            break
    for match in _RANDOM.finditer(line):
        if _is_random(match.group()):
            yield match.span()


@cache
def _plugin_patterns() -> list[tuple[str, re.Pattern[str]]]:
    from importlib import import_module

    from detect_secrets.plugins.base import RegexBasedDetector

    found = []
    for name in PLUGINS:
        module = import_module(f"detect_secrets.plugins.{name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, RegexBasedDetector)
                and value.__module__ == module.__name__
            ):
                found += [(name, pattern) for pattern in cast(Iterable[re.Pattern[str]], value.denylist)]
    return found


def _is_random(token: str) -> bool:
    """Whether a long word looks drawn rather than written: all three sorts of characters, and few repetitions."""
    from detect_secrets.plugins.high_entropy_strings import Base64HighEntropyString

    sorts = (sum(map(str.isdigit, token)), sum(map(str.isupper, token)), sum(map(str.islower, token)))
    if min(sorts) < 2:
        return False
    least = next(bits for length, bits in _RANDOM_BITS if len(token) >= length)
    return float(Base64HighEntropyString().calculate_shannon_entropy(token)) > least


def _passwords(text: str, region: str | None) -> Iterator[Span]:
    """What follows `password:` and the like, if it is one word that nobody writes in a sentence.

    A plain word counts in quotes or, after a password, as the last of its line. Expressions of code are left alone.
    """
    for match in _PASSWORD.finditer(text):
        value, start = match["value"].rstrip(".,;:!?*"), match.start("value")
        alone = match["word"].lower().startswith(("pass", "pwd")) and text[match.end() : match.end() + 1] in ("", "\n")
        code = set(value) & set("()[]{}<>$") or (all(part.isidentifier() for part in value.split(".")) and "." in value)
        if not code and (match["quote"] or alone or not value.isalpha()):
            yield start, start + len(value)


def _emails(text: str, region: str | None) -> Iterator[Span]:
    return (span for span in _spans(_EMAIL, text) if not _IN_ADDRESS.search(text, max(0, span[0] - 200), span[0]))


def _cards(text: str, region: str | None) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits[0] in "23456" and _luhn(digits):
            yield match.span()


def _luhn(digits: str) -> bool:
    doubled = [int(d) if i % 2 == 0 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _phones(text: str, region: str | None) -> Iterator[Span]:
    """Valid numbers that are written as phone numbers: with a plus, grouped as is usual, or after a word like `tel`."""
    for match in _MAYBE_PHONES.finditer(text):
        from phonenumbers import Leniency, PhoneNumberMatcher

        chunk, start = match.group(), match.start()
        valid = list(PhoneNumberMatcher(chunk, region, Leniency.VALID))
        grouped = {n.start for n in PhoneNumberMatcher(chunk, region, Leniency.STRICT_GROUPING)} if valid else set()
        for number in valid:
            first, last = start + number.start, start + number.end
            first += text[first] == "(" and ")" not in text[first:last]
            if number.raw_string.isdigit():
                written = bool(_PHONE_WORD.search(text, max(0, first - 40), first))
            else:
                written = number.raw_string.startswith("+") or number.start in grouped
            if written:
                yield first, last


_ALL = (("key", _keys), ("password", _passwords), ("e-mail", _emails), ("card", _cards), ("phone", _phones))
