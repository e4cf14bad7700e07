"""A conversation: the messages so far, and replies as visible text with the tokens that it is made of.

It prints nothing and reads nothing: `view` shows replies, `session` knows commands and files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from niels_gpt.chat.options import ChatOptions
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data.types import Message
from niels_gpt.generate import StopText
from niels_gpt.infer.steps import Memory, Step, stream_steps
from niels_gpt.settings import default_settings
from niels_gpt.unicode import valid_unicode


@dataclass(frozen=True)
class Span:
    """Visible text that one token completed: with it come tokens before it that completed no character."""

    text: str
    steps: tuple[Step, ...]
    begins: bool  # False for the rest of a token whose beginning was shown already

    @property
    def bits(self) -> float:
        """How surprising the tokens were together."""
        return sum(surprise(step) for step in self.steps)


def surprise(step: Step) -> float:
    """Surprisal of a token in bits: -log2 of the probability that the model itself gave it."""
    return -step.logprob / math.log(2)


class Conversation:
    """The messages so far, and one random generator for all replies. `options` may be replaced between replies."""

    def __init__(self, loaded: LoadedModel, options: ChatOptions, *, alternatives: int = 0) -> None:
        """alternatives: how many likeliest tokens each step of a reply lists."""
        self.loaded, self.options, self.alternatives = loaded, options, alternatives
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stop_ids, self._banned_ids = _stop_and_banned_ids(loaded)
        # Each turn begins with the turns before it: what the model has read of them it need not read again.
        self._memory = Memory(loaded.model, weights=options.weights, native=options.native)
        self.system = options.system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.restore([Message("system", self.system)] if self.system else [])

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on from these messages; a system message at their start is the system prompt from now on."""
        self.messages = list(messages)
        self.system = messages[0].content if messages and messages[0].role == "system" else ""
        self.reply_steps: list[Step] = []
        self.reply_was_cut = False  # because the context is full
        self.used = 0  # positions of the context that prompt and reply of the last turn took
        self.dropped = 0  # oldest messages that the last prompt had no room for

    def set_system(self, text: str) -> None:
        """Another system prompt for the same conversation; "" = none."""
        rest = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        self.messages = [*([Message("system", text)] if text else []), *rest]
        self.system = text

    @property
    def context(self) -> int:
        """Positions that the model has for prompt and reply."""
        return self.loaded.model.cfg.T

    def reply(self, text: str) -> Generator[Span, None, None]:
        """Yield the visible reply to a user's text, token by token, without blanks around it.

        Text and reply are remembered when the iterator ends or is closed early, unless the reply is empty. The first
        span raises ValueError if the text does not fit the model's context; then nothing is remembered.
        """
        asked, said = Message("user", valid_unicode(text)), ""
        context, wanted = self.context, self.options.max_new_tokens
        prompt = self.loaded.chat_format.encode_prompt([*self.messages, asked], context=context, max_new_tokens=wanted)
        room = context - len(prompt.ids) if self.options.use_cache else wanted  # without a cache, the window slides
        self.dropped, self.used = prompt.dropped, len(prompt.ids)
        self.reply_steps, self.reply_was_cut = [], False
        steps = stream_steps(
            self.loaded.model,
            prompt.ids,
            max_new_tokens=min(wanted, room),
            sampling=self.options.sampling,
            generator=self._generator,
            stop_ids=self._stop_ids,
            banned_ids=self._banned_ids,
            tokenizer=self.loaded.tokenizer,
            top_n=self.alternatives,
            use_cache=self.options.use_cache,
            memory=self._memory if self.options.use_cache else None,
        )
        tokens, stop = _Tokens(), StopText(self.loaded.chat_format.text_stops)

        def pieces() -> Iterator[str]:
            ended = False
            for step in steps:
                self.reply_steps.append(step)
                tokens.wrote(step)
                yield stop.push(step.text)
                ended = stop.found or step.token_id in self._stop_ids
                if stop.found:
                    break
            self.reply_was_cut = room < wanted and not ended
            yield stop.flush()

        try:
            for piece in stripped(pieces()):
                for span in tokens.behind(piece):
                    said += span.text
                    yield span
        finally:
            self.used = min(context, len(prompt.ids) + len(self.reply_steps))
            if said:
                self.messages += [asked, Message("assistant", said)]

    def again(self) -> Generator[Span, None, None]:
        """As `reply`, to the last user's message once more; the earlier reply is forgotten as soon as there is another.

        Raises ValueError, at the first span, if there is no user's message.
        """
        before = self.messages
        last = max((n for n, message in enumerate(before) if message.role == "user"), default=None)
        if last is None:
            raise ValueError("there is no reply yet that could be given again")
        self.messages = before[:last]
        try:
            yield from self.reply(before[last].content)
        finally:
            if len(self.messages) == last:
                self.messages = before


class _Tokens:
    """Tells the tokens behind a text that is shown later than it was written, and maybe without its first blanks."""

    def __init__(self) -> None:
        self._parts: deque[Span] = deque()
        self._silent: list[Step] = []  # no text yet: parts of a character
        self._started = False

    def wrote(self, step: Step) -> None:
        self._silent.append(step)
        if step.text:
            self._parts.append(Span(step.text, tuple(self._silent), begins=True))
            self._silent = []

    def behind(self, text: str) -> Iterable[Span]:
        """The next visible text, cut into what each token gave."""
        if not self._started:
            self._skip_blanks()
        spans, left = [], len(text)
        while left:
            part = self._parts.popleft()
            if len(part.text) > left:
                self._parts.appendleft(Span(part.text[left:], part.steps, begins=False))
                part = Span(part.text[:left], part.steps, part.begins)
            spans.append(part)
            left -= len(part.text)
        return spans

    def _skip_blanks(self) -> None:
        self._started = True
        while not self._parts[0].text.strip():
            self._parts.popleft()
        first = self._parts.popleft()
        self._parts.appendleft(Span(first.text.lstrip(), first.steps, begins=True))


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The same text without blanks at its two ends."""
    started, held = False, ""
    for piece in pieces:
        text = held + piece if started else piece.lstrip()
        visible = text.rstrip()
        held = text[len(visible) :]
        if visible:
            started = True
            yield visible


def _stop_and_banned_ids(loaded: LoadedModel) -> tuple[frozenset[int], tuple[int, ...]]:
    """What ends a reply and what is never sampled: the chat format's ids unless the settings say otherwise."""
    chat, settings = loaded.chat_format, loaded.settings or default_settings()
    asked_stop, asked_bans = settings.generation.stop_token_id, settings.generation.banned_token_ids
    stops = chat.stop_ids if asked_stop is None else frozenset({asked_stop})
    if asked_bans is not None:
        return stops, asked_bans
    if settings.sft_format.ban_role_tokens_during_generation:
        return stops, chat.banned_ids
    return stops | frozenset(chat.banned_ids), ()  # a role that may be sampled starts another turn: this one ends
