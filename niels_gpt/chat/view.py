"""How replies are shown: as they come, with the speed and a context meter on a terminal, and looked into on request.

Looking into a reply (`inspect`) colours each token by its surprisal, in bits; where there are no colours, small numbers
after the tokens say the same. Then come the least certain tokens with what else was likely.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Generator

from rich.text import Text

from niels_gpt.chat.conversation import Conversation, Span, surprise
from niels_gpt.console import OutputConsole
from niels_gpt.tokenizer import Tokenizer

# On a terminal, control characters out of an untrained model would move the cursor or worse; some turn text around.
_TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
UNPRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160), *_TURNING) if chr(code) not in "\n\t"}

LEVELS = ((1.0, ""), (3.0, "green"), (6.0, "magenta"), (math.inf, "bold red underline"))  # bits below which, style
ALTERNATIVES = 5  # likeliest tokens that are asked for
LISTED = 5  # least certain tokens that are listed,
CERTAIN = 0.1  # if they surprised by so many bits
_SMALL = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_BAR = 10  # characters of the context meter
_NAMES = {"sys": "[system]", "usr": "[user]", "asst": "[assistant]", "eot": "[end]"}


class View:
    """Prints replies to stdout, and notes to stderr."""

    def __init__(self, *, inspect: bool = False) -> None:
        self.inspect = inspect
        self.on_terminal = sys.stdout.isatty()
        self._console = OutputConsole(markup=False, emoji=False)
        self._coloured = self._console.color_system is not None and not self._console.no_color
        self._legend_shown = False

    def speak(self, conversation: Conversation, spans: Generator[Span, None, None]) -> None:
        """Print a reply as it comes; then, on a terminal, how fast it came and how full the context is."""
        start, empty, told = time.perf_counter(), True, conversation.dropped
        with contextlib.closing(spans):
            for span in spans:
                if empty and conversation.dropped > told:
                    note(
                        f"note: the {conversation.dropped} oldest messages no longer fit the context of "
                        f"{conversation.context} tokens; the model does not see them any more"
                    )
                self._show(span)
                empty = False
        seconds = time.perf_counter() - start
        if empty:
            note("(no reply)")
        self.print("\n", end="")
        if conversation.reply_was_cut:
            note("note: the reply ends here because the model's context is full")
        if self.inspect:
            self._look_into(conversation)
        if self.on_terminal:
            self.print(self._meter(conversation, seconds))

    def print(self, text: str, end: str = "\n") -> None:
        """Write to stdout at once; to a terminal without control characters."""
        print(self._printable(text), end=end, flush=True)

    def legend(self) -> None:
        """What the colours, or the small numbers, mean; once."""
        if self._legend_shown:
            return
        self._legend_shown = True
        if not self._coloured:
            example = self._mark(7)
            self.print(f"[{example} after a token: it surprised the model by 7 bits, it gave it 1 chance in 2^7]")
            return
        line, below = Text("[surprise of each token in bits: "), 0.0
        for limit, style in LEVELS:
            name = f"{below:.0f} to {limit:.0f}" if limit < math.inf else f"over {below:.0f}"
            line.append(name, style).append(", " if limit < math.inf else "; n bits = 1 chance in 2^n]")
            below = limit
        self._console.print(line)

    # parts of a reply

    def _show(self, span: Span) -> None:
        if not self.inspect:
            self.print(span.text, end="")
        elif self._coloured:
            style = next(style for limit, style in LEVELS if span.bits < limit)
            self._console.print(Text(self._printable(span.text), style), end="")
            sys.stdout.flush()
        else:
            bits = round(span.bits)
            shown = span.text.rstrip()
            mark = self._mark(bits) if span.begins and bits >= 1 else ""
            self.print(shown + mark + span.text[len(shown) :], end="")

    def _mark(self, bits: int) -> str:
        small = str(bits).translate(_SMALL)
        return small if self._can_write(small) else f"({bits})"

    def _look_into(self, conversation: Conversation) -> None:
        steps, tokenizer = conversation.reply_steps, conversation.loaded.tokenizer
        if not steps:
            return
        mean = sum(map(surprise, steps)) / len(steps)
        doubtful = sorted((step for step in steps if surprise(step) >= CERTAIN), key=surprise, reverse=True)[:LISTED]
        least = f"least certain of {len(steps)}:" if doubtful else "it was sure of every one"
        self.print(f"[{mean:.2f} bits a token; {least}]")
        for step in doubtful:
            others = [(i, p) for i, p in step.top if i != step.token_id][: ALTERNATIVES - 1]
            instead = ", ".join(_likely(tokenizer, token_id, logprob) for token_id, logprob in others)
            self.print(
                f"  {surprise(step):5.1f} bits  {_likely(tokenizer, step.token_id, step.logprob)}; else {instead}"
            )

    def _meter(self, conversation: Conversation, seconds: float) -> str:
        used, context, tokens = conversation.used, conversation.context, len(conversation.reply_steps)
        full, empty = ("█", "░") if self._can_write("█░") else ("#", "-")
        filled = round(_BAR * used / context)
        bar = full * filled + empty * (_BAR - filled)
        speed = tokens / seconds if seconds else 0.0
        return f"[{tokens} tokens, {speed:.1f} tokens/s; context {bar} {used} of {context}]"

    def _printable(self, text: str) -> str:
        return text.translate(UNPRINTABLE) if self.on_terminal else text

    @staticmethod
    def _can_write(text: str) -> bool:
        try:
            text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return False
        return True


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as people can read it: quoted text, bytes of a character as hex, the role that a sentinel starts."""
    special = {number: name for name, number in tokenizer.special_token_ids().items()}
    if token_id in special:
        return _NAMES[special[token_id]]
    if token_id >= tokenizer.vocab_size:
        return f"[{token_id}]"
    written = tokenizer.token_bytes(token_id)
    try:
        return json.dumps(written.decode("utf-8"), ensure_ascii=False) if written else f"[{token_id}]"
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02X}" for byte in written)


def _likely(tokenizer: Tokenizer, token_id: int, logprob: float) -> str:
    return f"{token_name(tokenizer, token_id)} {math.exp(logprob):.1%}"


def note(text: str) -> None:
    """Tell a person on stderr, beside what stdout carries."""
    print(text, file=sys.stderr, flush=True)
