"""What exports are tried on before they get their name: strings of any Unicode, conversations, rows of ids. Seeded."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.data.types import Message
from niels_gpt.export.spm import SENTINEL_ID
from niels_gpt.export.templates import MARK
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import Tokenizer
from niels_gpt.unicode import BLANK

STRINGS, CONVERSATIONS, ROWS = 1000, 50, 4
MOST_POSITIONS = 1024  # of a row of ids; longer contexts are compared over their first part
SENTINELS = tuple(SPECIAL_TOKENS.values())

_FIXED = (
    "",
    " ",
    "  two  blanks  ",
    "a\tb\n\n\nc\r\n d",
    "def f(x):\n    return x ** 2  # code\n",
    "日本語のテキストと漢字。",
    "Привет, мир! Ελληνικά. עברית. العربية.",
    "🙂🙃👩‍👩‍👧‍👦🇩🇪❤️",
    "cafe\u0301 and café, ﬁ, Å, ﷺ, ①",
    "<s>struck</s> <unk> <0x0A> &lt;b&gt;",
    f"{BLANK}a{BLANK}{BLANK} b{BLANK}",
    "\x00\x01\x7f\x80\ufffd\ufeff",
    "\U0010ffff\ue000\u200b\u2028",
    "aaaaaaaaaaaaaaaa abababababa",
    "1234567890 3.14159 -1e-5",
)


def strings(tokenizer: Tokenizer) -> list[str]:
    """STRINGS of them: fixed awkward ones, then random ones of any Unicode, of few letters, and of joined pieces."""
    rng = random.Random(0)
    pieces = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in range(tokenizer.vocab_size)]
    found = list(_FIXED)
    makers: tuple[Callable[[random.Random], str], ...] = (_any_unicode, _everyday, _few_letters)
    while len(found) < STRINGS:
        kind = len(found) % 4
        text = "".join(rng.choices(pieces, k=rng.randint(1, 30))) if kind == 3 else makers[kind](rng)
        if not any(literal in text for literal in SENTINELS):
            found.append(text)
    return found[:STRINGS]


def _any_unicode(rng: random.Random) -> str:
    points = [rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 40))]
    return "".join(chr(p if p < 0xD800 else p + 0x800) for p in points)


_BLOCKS = (
    *((0x20, 0x7F),) * 3,
    *((0xA0, 0x250), (0x370, 0x530), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)),
    *((0x1F300, 0x1FAFF), (0x2010, 0x2060), (0x0A, 0x0B)),
)


def _everyday(rng: random.Random) -> str:
    """Letters of a few scripts, emoji, punctuation and line breaks."""
    return "".join(chr(rng.randrange(*rng.choice(_BLOCKS))) for _ in range(rng.randint(1, 60)))


def _few_letters(rng: random.Random) -> str:
    """Repetitions, where the order of merges shows."""
    letters = rng.sample("abcest .\n0", k=3)
    return "".join(rng.choices(letters, k=rng.randint(1, 40)))


def conversations(texts: list[str]) -> list[list[Message]]:
    """Conversations of `texts`, with and without a system message, empty and blank messages among them."""
    rng = random.Random(1)
    texts = ["", " ", "\nuser: hello\nassistant: no\nsystem: x", "user: hi\n", *texts]
    found = []
    for n in range(CONVERSATIONS):
        messages = [Message("system", rng.choice(texts))] if n % 3 == 0 else []
        for _ in range(rng.randint(1, 4)):
            messages += [Message("user", rng.choice(texts)), Message("assistant", rng.choice(texts))]
        found.append(messages[:-1] if n % 2 else messages)
    return found


def forgeries() -> list[str]:
    """Texts that pose as control: every sentinel, whole, split, nested, with marks in between."""
    whole = [*SENTINELS, "".join(SENTINELS), *(f"hello {s}{s} you" for s in SENTINELS)]
    halves = [s[:20] + "\u200b" + s[20:] for s in SENTINELS] + [s[:9] + s + s[9:] for s in SENTINELS]
    return (
        whole
        + halves
        + [f"a{MARK}{s}" for s in SENTINELS]
        + [s.replace(SENTINEL_ID, MARK + SENTINEL_ID) for s in SENTINELS]
    )


def rows(cfg: ModelConfig) -> Tensor:
    """(ROWS, T) ids, T at most MOST_POSITIONS."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cfg.V, (ROWS, min(cfg.T, MOST_POSITIONS)), generator=generator)
