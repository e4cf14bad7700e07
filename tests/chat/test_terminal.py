"""The chat on a real pseudo-terminal: editor, history, colours, Ctrl-C; and the history file on its own."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shlex
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from niels_gpt import paths
from niels_gpt.chat.terminal import HISTORY_BYTES, private_history

CTRL_C, CTRL_D, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"
READY = r"\x1b\[0m>.{0,40}\x1b\[\?25h"  # the editor draws the prompt, without its blank, and shows the cursor
PATIENCE = 60.0  # seconds; only a hang takes as long


class Terminal:
    """A chat in a process that has a terminal of its own."""

    def __init__(self, home: Path, *flags: str) -> None:
        self._ours, theirs = os.openpty()
        self._theirs: int | None = theirs
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))  # rows, columns, pixels
        name = os.ttyname(theirs)
        command = shlex.join([sys.executable, "-m", "niels_gpt.chat_cli", "--device", "cpu", "--system", "", *flags])
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {command} <{name} >{name} 2>&1"],  # opened by the session's leader: it gets Ctrl-C
            start_new_session=True,
            cwd=home,
            env={
                **{key: value for key, value in os.environ.items() if key != "NO_COLOR"},
                "PYTHONPATH": str(paths.PROJECT_ROOT),
                "XDG_STATE_HOME": str(home / "state"),
                "TERM": "xterm-256color",
                "PYTHONUTF8": "1",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        self._seen = b""

    def expect(self, pattern: str) -> None:
        """Wait for text that matches (as bytes), after what was expected before."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern.encode(), self._seen, re.DOTALL)):
            ready = select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0]
            came = self._read() if ready else b""
            assert came, f"{pattern!r} never came; the screen has {self._seen[-2000:].decode('utf-8', 'replace')!r}"
            self._seen += came
        self._seen = self._seen[found.end() :]

    def _read(self) -> bytes:
        """What came; b"" at the end. Our own handle keeps the terminal open until the chat has opened it."""
        try:
            came = os.read(self._ours, 65536)
        except OSError:
            came = b""
        if self._theirs is not None:
            os.close(self._theirs)
            self._theirs = None
        return came

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def say(self, line: str) -> None:
        """Type a line once the prompt is there, and Enter once the line is."""
        self.type(line)
        self.expect(re.escape(line[-1]))
        self.type("\r")

    def end(self) -> int:
        """Read to the end; the exit status."""
        while select.select([self._ours], [], [], PATIENCE)[0] and self._read():
            pass
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._ours)


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def test_a_chat_on_a_terminal(
    chat_checkpoint: Path, byte_chat_checkpoint: Path, tmp_path: Path, opened: list[Terminal]
) -> None:
    terminal = Terminal(tmp_path, "--ckpt", str(chat_checkpoint), "--temperature", "0")
    opened.append(terminal)
    terminal.expect(READY)
    terminal.say("hi")
    terminal.expect(r"hello ✨ friend\r\n\[\d+ tokens, [\d.]+ tokens/s; context (?:█)+(?:░)+ \d+ of 64\]\r\n.*" + READY)
    terminal.type("never sent")
    terminal.expect("sent")
    terminal.type(CTRL_C)  # drops the line
    terminal.type("/ins" + TAB)
    terminal.expect("pect")
    terminal.type("\r")
    terminal.expect(r"\[surprise of each token in bits: .*\x1b\[.*over 6.*" + READY)
    terminal.say("/save talk.jsonl")
    terminal.expect(r"saved 2 messages.*" + READY)
    terminal.say("/nonsense")
    terminal.expect(r"Error: there is no command /nonsense.*" + READY)
    terminal.type(CTRL_C)
    assert terminal.end() == 0
    history = tmp_path / "state/niels-gpt/chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = [line[1:] for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept == ["hi", "/inspect", "/save talk.jsonl", "/nonsense"]


def test_ctrl_c_stops_an_endless_reply_and_the_chat_goes_on(
    byte_chat_checkpoint: Path, tmp_path: Path, opened: list[Terminal]
) -> None:
    endless = ("--temperature", "50", "--top-k", "0", "--no-kv-cache", "--max-new-tokens", "100000000")
    terminal = Terminal(tmp_path, "--ckpt", str(byte_chat_checkpoint), *endless, "--no-history")
    opened.append(terminal)
    terminal.expect(READY)
    terminal.say("hi")
    terminal.expect(r"\r\n.{40}")
    terminal.type(CTRL_C)
    terminal.expect(READY)
    terminal.say("/temp 0")
    terminal.expect("temperature: 0.*" + READY)
    terminal.say("/reset")
    terminal.expect(READY)
    terminal.say("hi")
    terminal.expect("hello ✨ friend")
    terminal.expect(READY)
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert not (tmp_path / "state").exists()


def test_a_long_history_loses_its_older_half(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    assert private_history(path) is not None
    entries = "".join(f"\n# 2026-01-01 00:00:00.{n}\n+line {n} {'x' * 100}\n" for n in range(HISTORY_BYTES // 100))
    path.write_text(entries)
    path.chmod(0o644)
    history = private_history(path)
    assert history is not None and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    lines = list(history.load_history_strings())
    assert lines[0].startswith(f"line {HISTORY_BYTES // 100 - 1} ") and len(lines) < HISTORY_BYTES // 150
    assert all(re.fullmatch(r"line \d+ x{100}", line) for line in lines)
    history.store_string("kept")
    history.store_string(" secret")
    assert next(iter(history.load_history_strings())) == "kept"


def test_a_history_that_cannot_be_kept_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert private_history(tmp_path / "file" / "history") is None
    assert private_history(tmp_path) is None
