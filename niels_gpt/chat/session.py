"""A chat at the keyboard or through a pipe: lines are answered, lines that start with / are commands."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from niels_gpt import files
from niels_gpt.chat.conversation import Conversation
from niels_gpt.chat.options import ChatOptions
from niels_gpt.chat.terminal import line_reader
from niels_gpt.chat.view import ALTERNATIVES, View, note
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data.primer import read_chat_jsonl, write_chat_jsonl
from niels_gpt.data.types import Message
from niels_gpt.infer.sampling import Sampling

_COMMAND = re.compile(r"(/[A-Za-z?]+)(?:\s+(.*))?", re.DOTALL)  # /usr/bin is no command
_NO_SYSTEM = "-"
N = TypeVar("N", int, float)


class Session:
    """One conversation, its view, and the file it was saved to or loaded from."""

    def __init__(self, loaded: LoadedModel, options: ChatOptions, *, inspect: bool = False) -> None:
        self.conversation = Conversation(loaded, options)
        self.view = View()
        self.file: Path | None = None
        self.done = False
        if inspect:
            self.inspect("on")

    def take(self, line: str) -> None:
        """Do what a line asks for. ValueError and OSError, for people, leave the conversation as it was."""
        line = line.strip()
        command = _COMMAND.fullmatch(line)
        if command:
            name, argument = command[1].lower(), (command[2] or "").strip()
            if name not in COMMANDS:
                near = [c for c in COMMANDS if c.startswith(name)] or get_close_matches(name, COMMANDS, 1)
                meant = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"there is no command {name}; {meant}/help lists them, //... says it to the model")
            COMMANDS[name][2](self, argument)
        elif line:
            self._say(line[1:] if line.startswith("//") else line)

    def _say(self, text: str) -> None:
        self.view.speak(self.conversation, self.conversation.reply(text))

    # commands

    def help(self, _: str) -> None:
        """Every command with its meaning."""
        for name, (argument, meaning, _run) in COMMANDS.items():
            self.view.print(f"{f'{name} {argument}'.rstrip():<18} {meaning}")

    def leave(self, _: str) -> None:
        """End the chat after this command."""
        self.done = True

    def reset(self, _: str) -> None:
        """Forget the conversation, but for the system prompt; the next one is not saved over it."""
        self.conversation.reset()
        self.file = None

    def system(self, text: str) -> None:
        """Show or replace the system prompt."""
        if text:
            self.conversation.set_system("" if text == _NO_SYSTEM else text)
        self.view.print(f"[system prompt: {self.conversation.system or 'none'}]")

    def save(self, name: str) -> None:
        """Write the conversation as one line of chat JSONL; only a file of this chat is replaced."""
        fresh = Path(time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        path = Path(name).expanduser() if name else self.file or fresh
        if not any(message.role == "assistant" for message in self.conversation.messages):
            raise ValueError("there is nothing to save yet: no reply was given")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it, such as {path / fresh.name}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        if path.exists() and path != self.file:
            raise ValueError(f"{path} exists and is not of this chat; choose another name")
        write_chat_jsonl(path, [[asdict(message) for message in self.conversation.messages]])
        self.file = path
        self.view.print(f"[saved {len(self.conversation.messages)} messages to {path}]")

    def load(self, name: str) -> None:
        """Go on with a conversation of a chat JSONL file: its only one, the one asked for by number, or the first."""
        if not name:
            raise ValueError("name the file: /load FILE, or /load FILE 3 for its third conversation")
        path, number = Path(name).expanduser(), 1
        if not path.is_file() and (split := re.fullmatch(r"(.*\S)\s+(\d+)", name)):
            path, number = Path(split[1]).expanduser(), int(split[2])
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        chats = [messages for _, messages in read_chat_jsonl(path)]
        if not 1 <= number <= len(chats):
            raise ValueError(f"{path} has the conversations 1 to {len(chats)}, not {number}")
        self.conversation.restore([Message(**message) for message in chats[number - 1]])
        self.file = path if len(chats) == 1 else None  # /save would drop the others
        which = f"conversation {number} of {len(chats)}" if len(chats) > 1 else "a conversation"
        self.view.print(f"[loaded {which}, {len(self.conversation.messages)} messages, from {path}]")
        last = self.conversation.messages[-1]
        if last.role == "user":
            self.view.print("[its last message is the user's: /regen answers it]")

    def regen(self, _: str) -> None:
        """Another reply to the last message."""
        self.view.speak(self.conversation, self.conversation.again())

    def temp(self, text: str) -> None:
        """Show or set the temperature."""
        if text:
            self._sample(replace(self._sampling, temperature=_number(text, float)))
        self.view.print(f"[temperature: {self._sampling.temperature:g}]")

    def topk(self, text: str) -> None:
        """Show or set from how many of the likeliest tokens a reply is drawn; 0 is all."""
        if text:
            self._sample(replace(self._sampling, top_k=_number(text, int)))
        self.view.print(f"[top-k: {self._sampling.top_k or 'off'}]")

    @property
    def _sampling(self) -> Sampling:
        return self.conversation.options.sampling

    def _sample(self, sampling: Sampling) -> None:
        self.conversation.options = replace(self.conversation.options, sampling=sampling)

    def inspect(self, text: str) -> None:
        """Switch between plain replies and ones that are looked into."""
        if text not in ("", "on", "off"):
            raise ValueError(f"/inspect is on or off, not {text!r}")
        self.view.inspect = text == "on" if text else not self.view.inspect
        self.conversation.alternatives = ALTERNATIVES if self.view.inspect else 0
        if self.view.inspect:
            self.view.legend()
        elif not text or self.view.on_terminal:
            self.view.print("[plain replies]")


def _number(text: str, kind: type[N]) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None


Command = Callable[[Session, str], None]
COMMANDS: dict[str, tuple[str, str, Command]] = {
    "/help": ("", "this list", Session.help),
    "/exit": ("", "leave (as do Ctrl-D, and Ctrl-C at an empty prompt; Ctrl-C stops a reply)", Session.leave),
    "/reset": ("", "forget the conversation, not the system prompt", Session.reset),
    "/system": ("[TEXT]", f"show or change the system prompt; {_NO_SYSTEM} = none", Session.system),
    "/save": ("[FILE]", "write the conversation as a line of chat JSONL, which /load and training read", Session.save),
    "/load": ("FILE [N]", "go on with a saved conversation, the N-th of the file", Session.load),
    "/regen": ("", "answer the last message again (another way, unless the temperature is 0)", Session.regen),
    "/temp": ("[X]", "show or change the temperature; 0 = always the likeliest token", Session.temp),
    "/topk": ("[K]", "show or change how many tokens are sampled among; 0 = all", Session.topk),
    "/inspect": ("[on|off]", "show how surprising each token was, and what else was likely", Session.inspect),
}


def run_chat(
    loaded: LoadedModel,
    options: ChatOptions,
    *,
    inspect: bool = False,
    load: str | None = None,
    keep_system: bool = False,
    history: bool = True,
) -> int:
    """Take lines from stdin until /exit, end of input or Ctrl-C at the prompt; returns the exit status 0.

    load: a file as `/load` takes it, to start from; what is wrong with it is raised. keep_system: the system prompt of
    the options holds, not that of the file. history: keep what was typed.
    """
    session = Session(loaded, options, inspect=inspect)
    if load is not None:
        session.load(load)
        if keep_system:
            session.conversation.set_system(options.system)
    read_line = line_reader(list(COMMANDS), history=history)
    while not session.done:
        try:
            line = read_line()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        try:
            session.take(line)
        except KeyboardInterrupt:
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            note(f"Error: {files.explained(error)}")
    return 0


def answer_once(loaded: LoadedModel, options: ChatOptions, questions: Sequence[str], *, inspect: bool = False) -> int:
    """Answer each question in a conversation of its own, on stdout; returns the exit status 0."""
    view = View(inspect=inspect)
    if inspect:
        view.legend()
    for question in questions:
        if len(questions) > 1:
            print(f"> {question}")
        conversation = Conversation(loaded, options, alternatives=ALTERNATIVES if inspect else 0)
        view.speak(conversation, conversation.reply(question))
    return 0
