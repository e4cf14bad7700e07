"""Finding what must not be learned: keys, tokens, passwords, e-mail addresses, phone and card numbers.

The patterns of keys are those of detect-secrets, used directly because several of its plugins report only a part of
what they matched; phone numbers are found by phonenumbers. Everything else here exists to keep ordinary prose as it is:
dates, ISBNs, years, colours, versions and sums are not secrets.
"""

from __future__ import annotations

import re
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
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [^\n]{0,40}PRIVATE KEY[^\n]{0,40}?-----.{0,20000}?-----END [^\n]{0,40}PRIVATE KEY[^\n]{0,40}?-----"
    r"|-----BEGIN [^\n]{0,40}PRIVATE KEY[^\n]{0,40}?-----(?:\n[^\s]{16,200}(?=\n|\Z))*",
    re.DOTALL,
)
_NEWER_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20,}|github_pat_[A-Za-z0-9_]{22,}|hf_[A-Za-z0-9]{30,}|AIza[A-Za-z0-9_-]{35}"
    r"|[sr]k_test_[A-Za-z0-9]{24,}|xapp-[A-Za-z0-9-]{20,}|npm_[A-Za-z0-9]{36}|ya29\.[A-Za-z0-9_-]{20,})"
)
_PASSWORD = re.compile(
    r"(?i:\b(?:[a-z0-9]{1,20}[_-]){0,4}(?P<word>pass(?:word|phrase|wd|code)?|pwd|secret|token|pin(?: code)?"
    r"|(?:api|access|secret|auth|private)[_ -]?key|client[_ -]?secret)\b)[\"'`*]{0,3} {0,3}(?::=|=>|[:=])[*]{0,2} {0,3}"
    r"(?P<quote>[\"'`]?)(?P<value>[^\s\"'`]{4,200})(?P=quote)"
)
_RANDOM = re.compile(r"(?<![\w/+=.-])[A-Za-z0-9_+-]{24,512}={0,2}(?![\w/+.-])")
_RANDOM_BITS = 4.2  # of entropy a character: long identifiers have less, 24 random letters and digits more
_EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(
    r"(?<![\w.+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-]|\.\d)"
)
_MAYBE_PHONE = re.compile(r"(?<![\w.])[+(]?\d(?:[ \t()./-]{0,3}\d){6,16}(?![\w])")
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
    """The secrets of a text in order. Where two overlap they are one, of the kind that comes first in `_ALL`."""
    spans = [
        (span, rank, kind)
        for rank, (kind, finder) in enumerate(_ALL)
        for span in finder(text, region)
        if span[0] < span[1]
    ]
    merged: list[tuple[int, int, int, str]] = []
    for (start, end), rank, kind in sorted(spans):
        if merged and start < merged[-1][1]:
            first, last, best, named = merged.pop()
            rank, kind = min((best, named), (rank, kind))
            start, end = first, max(last, end)
        merged.append((start, end, rank, kind))
    return [Found(start, end, kind) for start, end, _, kind in merged]


Span = tuple[int, int]


def _keys(text: str, region: str | None) -> Iterator[Span]:
    for pattern in (_PRIVATE_KEY, _NEWER_TOKENS):
        yield from (match.span() for match in pattern.finditer(text))
    for name, pattern in _plugin_patterns():
        for match in pattern.finditer(text):
            if name == "artifactory" and not any(map(str.isdigit, match.group())):
                continue  # APARTMENTS and other shouted words begin like one of its keys
            yield match.span(1 if name == "basic_auth" else 0)
    for match in _RANDOM.finditer(text):
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
    if min(sorts) < 3:
        return False
    return float(Base64HighEntropyString().calculate_shannon_entropy(token)) > _RANDOM_BITS


def _passwords(text: str, region: str | None) -> Iterator[Span]:
    """What follows `password:` and the like, if it is one word that nobody writes in a sentence.

    A plain word counts in quotes or, after a password, as the last of its line. Expressions of code are left alone.
    """
    for match in _PASSWORD.finditer(text):
        value, start = match["value"].rstrip(".,;:!?*"), match.start("value")
        alone = match["word"][0] in "pP" and text[match.end() : match.end() + 1] in ("", "\n")
        code = set(value) & set("()[]{}<>$") or (all(part.isidentifier() for part in value.split(".")) and "." in value)
        if not code and (match["quote"] or alone or not value.isalpha()):
            yield start, start + len(value)


def _emails(text: str, region: str | None) -> Iterator[Span]:
    return (match.span() for match in _EMAIL.finditer(text))


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
    candidates = list(_MAYBE_PHONE.finditer(text))
    if not candidates:
        return
    from phonenumbers import Leniency, PhoneNumberMatcher

    for match in candidates:
        raw = match.group()
        named = raw.isdigit() and _PHONE_WORD.search(text, max(0, match.start() - 40), match.start())
        if raw.isdigit() and not named:
            continue
        leniency = Leniency.VALID if raw.startswith("+") or named else Leniency.STRICT_GROUPING
        for number in PhoneNumberMatcher(raw, region, leniency):
            yield match.start() + number.start, match.start() + number.end


_ALL = (("key", _keys), ("password", _passwords), ("e-mail", _emails), ("card", _cards), ("phone", _phones))
