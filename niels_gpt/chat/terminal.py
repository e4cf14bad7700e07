"""Where lines come from: an editor with history and completion where a person types, plain lines from pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from niels_gpt import files, paths

if TYPE_CHECKING:
    from prompt_toolkit.history import History

PROMPT = "> "
HISTORY_FILE = "chat_history"  # in the user's state folder
HISTORY_BYTES = 1 << 20  # a longer history loses its older half at the next start
_FILE_COMMANDS = ("/save", "/load")


def line_reader(commands: Sequence[str], *, history: bool) -> Callable[[], str]:
    """A function that reads one line, without its end; it raises EOFError and KeyboardInterrupt."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _editor(commands, history=history)
    return lambda: input(PROMPT)


def _editor(commands: Sequence[str], *, history: bool) -> Callable[[], str]:
    # Imported here since scripts, which never see the editor, should not wait for it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    class Commands(Completer):
        """Names of commands, and of files after the commands that take one."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            typed = document.text_before_cursor
            name, blank, rest = typed.partition(" ")
            if not blank and typed.startswith("/"):
                for command in commands:
                    if command.startswith(typed):
                        yield Completion(command, start_position=-len(typed))
            elif name in _FILE_COMMANDS:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)

    keys = KeyBindings()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        """As in a shell: drop what was typed, leave where nothing was."""
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    kept = None
    if history:
        with suppress(RuntimeError):  # a user without a home
            kept = private_history(paths.state_dir() / HISTORY_FILE)
    session: PromptSession[str] = PromptSession(
        history=kept or InMemoryHistory(), completer=Commands(), complete_while_typing=False, key_bindings=keys
    )
    return lambda: session.prompt(PROMPT)


def private_history(path: Path) -> History | None:
    """The history in a file that only its owner can read; None where it cannot be had. " text" is not kept, as in bash.

    A file that became long loses its older half.
    """
    from prompt_toolkit.history import FileHistory

    class PrivateHistory(FileHistory):
        def store_string(self, string: str) -> None:
            if not string.startswith(" "):
                with suppress(OSError):  # a full disk does not end a chat
                    super().store_string(string)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            if os.name != "nt":
                os.fchmod(file.fileno(), 0o600)
        if path.stat().st_size > HISTORY_BYTES:
            _forget_older_half(path)
    except OSError:
        return None
    return PrivateHistory(str(path))


def _forget_older_half(path: Path) -> None:
    content = path.read_bytes()
    entry = content.find(b"\n# ", len(content) // 2)  # each entry begins with its time
    with files.atomic_write(path) as file:
        if os.name != "nt":
            os.fchmod(file.fileno(), 0o600)
        file.write(content[entry:] if entry >= 0 else b"")
