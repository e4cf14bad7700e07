"""Chatting with a loaded model: conversations, the interactive loop and one-shot answers.

It turns lines into messages and steps into visible text. Programs decide which model and options: `chat_cli`, and
`quickstart` at its end.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from niels_gpt import paths
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data.types import Message
from niels_gpt.generate import Memory, Sampling, StopText, stream_steps
from niels_gpt.settings import Settings, default_settings

BUILT_IN_SYSTEM = "Answer briefly and truthfully."
SYSTEM_FILE = "system_surly.txt"  # in configs/
DEFAULT_SEED = 42
HELP = "/help  this list\n/reset forget the conversation\n/exit  leave (as do Ctrl-D, and Ctrl-C at the prompt)"
# On a terminal, control characters out of an untrained model would move the cursor or worse.
UNPRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatOptions:
    """How to answer: fixed for one run of the program."""

    system: str  # "" = no system message
    sampling: Sampling
    max_new_tokens: int
    seed: int = DEFAULT_SEED
    use_cache: bool = True
    weights: str = "fp32"
    native: bool = True


def build_options(settings: Settings | None, system: str, **overrides: Any) -> ChatOptions:
    """Options from a checkpoint's settings (the defaults where it brings none).

    overrides: temperature, top_k, top_p, repetition_penalty, min_p, max_new_tokens, seed, use_cache, weights, native;
    None leaves a setting be.
    """
    settings = settings or default_settings()
    values = {
        name: getattr(settings.generation, name)
        for name in ("max_new_tokens", "weights", *(f.name for f in fields(Sampling)))
    }
    values["use_cache"] = settings.model.attention.use_kv_cache
    values["native"] = settings.generation.native_decoder
    values |= {name: value for name, value in overrides.items() if value is not None}
    sampling = Sampling(**{f.name: values.pop(f.name) for f in fields(Sampling)})
    return ChatOptions(system=system, sampling=sampling, **values)


def system_prompt(system_file: str | None = None, system: str | None = None) -> str:
    """The first of: the file named, the text given, configs/system_surly.txt (here, else shipped), the built-in one."""
    if system_file is not None:
        return _read_text(Path(system_file))
    if system is not None:
        return system
    here = paths.CONFIG_DIR / SYSTEM_FILE
    if here.is_file():
        return _read_text(here)
    try:
        return _read_text(paths.shipped(f"configs/{SYSTEM_FILE}"))
    except FileNotFoundError:
        return BUILT_IN_SYSTEM


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no system prompt file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the system prompt file {path} is not UTF-8 text") from None


class Conversation:
    """The messages so far, and one random generator for all replies."""

    def __init__(self, loaded: LoadedModel, options: ChatOptions) -> None:
        self._loaded, self._options = loaded, options
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stop_ids, self._banned_ids = _stop_and_banned_ids(loaded)
        # Each turn begins with the turns before it: what the model has read of them it need not read again.
        self._memory = Memory(loaded.model, weights=options.weights, native=options.native)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        system = self._options.system
        self.messages = [Message("system", system)] if system else []
        self.reply_tokens = 0
        self.reply_was_cut = False  # because the context is full
        self._told_dropped = 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yield the visible reply to a user's text, piece by piece, without blanks around it.

        Text and reply are remembered when the iterator ends or is closed early, unless the reply is empty. The first
        piece raises ValueError if the text does not fit the model's context; then nothing is remembered.
        """
        asked, said = Message("user", text), ""
        context, wanted = self._loaded.model.cfg.T, self._options.max_new_tokens
        prompt = self._loaded.chat_format.encode_prompt([*self.messages, asked], context=context, max_new_tokens=wanted)
        self._tell_dropped(prompt.dropped)
        room = context - len(prompt.ids) if self._options.use_cache else wanted  # without a cache, the window slides
        steps = stream_steps(
            self._loaded.model,
            prompt.ids,
            max_new_tokens=min(wanted, room),
            sampling=self._options.sampling,
            generator=self._generator,
            stop_ids=self._stop_ids,
            banned_ids=self._banned_ids,
            tokenizer=self._loaded.tokenizer,
            use_cache=self._options.use_cache,
            memory=self._memory if self._options.use_cache else None,
        )
        self.reply_tokens, self.reply_was_cut = 0, False
        stop = StopText(self._loaded.chat_format.text_stops)

        def pieces() -> Iterator[str]:
            ended = False
            for step in steps:
                self.reply_tokens += 1
                yield stop.push(step.text)
                ended = stop.found or step.token_id in self._stop_ids
                if stop.found:
                    break
            self.reply_was_cut = room < wanted and not ended
            yield stop.flush()

        try:
            for piece in _stripped(pieces()):
                said += piece
                yield piece
        finally:
            if said:
                self.messages += [asked, Message("assistant", said)]

    def _tell_dropped(self, dropped: int) -> None:
        if dropped > self._told_dropped:
            note(f"note: the {dropped} oldest messages no longer fit the context of {self._loaded.model.cfg.T} tokens")
            self._told_dropped = dropped


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


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The same text without blanks at its two ends."""
    started, held = False, ""
    for piece in pieces:
        text = held + piece if started else piece.lstrip()
        visible = text.rstrip()
        held = text[len(visible) :]
        if visible:
            started = True
            yield visible


def run_chat(loaded: LoadedModel, options: ChatOptions) -> int:
    """Read lines from stdin and answer each until /exit, end of input or Ctrl-C; returns the exit status 0."""
    conversation = Conversation(loaded, options)
    read_line = _line_reader()
    while True:
        try:
            line = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            conversation.reset()
        elif line:
            try:
                _speak(conversation, line)
            except KeyboardInterrupt:
                print()
            except ValueError as error:
                note(f"Error: {error}")


def answer_once(loaded: LoadedModel, options: ChatOptions, questions: Sequence[str]) -> int:
    """Answer each question in a conversation of its own, on stdout; returns the exit status 0."""
    for question in questions:
        if len(questions) > 1:
            print(f"> {question}")
        _speak(Conversation(loaded, options), question)
    return 0


def _speak(conversation: Conversation, text: str) -> None:
    """Print the reply as it comes; on a terminal also how fast it came."""
    on_terminal = sys.stdout.isatty()
    start, empty = time.perf_counter(), True
    with contextlib.closing(conversation.reply(text)) as pieces:
        for piece in pieces:
            print(piece.translate(UNPRINTABLE) if on_terminal else piece, end="", flush=True)
            empty = False
    if empty:
        note("(no reply)")
    print(flush=True)
    if conversation.reply_was_cut:
        note("note: the reply ends here because the model's context is full")
    if on_terminal:
        seconds = time.perf_counter() - start
        print(f"[{conversation.reply_tokens} tokens, {conversation.reply_tokens / seconds:.1f} tokens/s]", flush=True)


def _line_reader() -> Callable[[], str]:
    """Editing and history where a person types; plain lines from pipes and tests."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from prompt_toolkit import PromptSession

            session: PromptSession[str] = PromptSession()
            return lambda: session.prompt("> ")
    return lambda: input("> ")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
