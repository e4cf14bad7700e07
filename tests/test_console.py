"""Consoles on stdout: a reader that has gone is an error that the program hears of."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from niels_gpt.console import OutputConsole

ROOT = Path(__file__).resolve().parents[1]


def test_a_reader_that_has_gone_is_an_error_and_no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            OutputConsole().print("hello")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what is left in its buffer


def test_every_console_on_stdout_is_one_of_these() -> None:
    """rich's own would end the program on the spot, with nothing saved and nothing said."""
    files = sorted(path for folder in ("niels_gpt", "tools") for path in (ROOT / folder).rglob("*.py"))
    made = [(path, node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    assert [f"{path.name}:{node.lineno}" for path, node in made if isinstance(node, ast.Call) and is_plain(node)] == []


def is_plain(call: ast.Call) -> bool:
    """`Console(...)` without a stream of its own."""
    named = isinstance(call.func, ast.Name) and call.func.id == "Console"
    return named and not {"stderr", "file"} & {keyword.arg for keyword in call.keywords}
