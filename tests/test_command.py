"""Every program ends alike: 0, 1 with a sentence, 130 for Ctrl-C; bugs stay visible."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from niels_gpt.command import Interrupted, exit_status


def raising(error: BaseException) -> Callable[[], int | None]:
    def work() -> int | None:
        raise error

    return work


def test_what_work_returns_is_the_status() -> None:
    assert exit_status(lambda: None) == 0 and exit_status(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("T is 0"), "error: T is 0\n"),
        (OSError(errno.ENOENT, "No such file", "a.pt"), "error: No such file: a.pt\n"),
        (OSError(errno.ENOSPC, "No space", "a.pt"), "error: the disk is full: No space: a.pt\n"),
    ],
)
def test_a_failure_is_a_sentence_and_1(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(raising(error)) == 1
    assert capsys.readouterr() == ("", said)


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(raising(KeyboardInterrupt()), stopped="stopped; nothing was made") == 130
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "stopped; nothing was made\n")


def test_how_to_go_on_is_said_after_every_stop(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(raising(Interrupted("saved to a.pt", 143))) == 143
    assert exit_status(raising(Interrupted("saved to a.pt", 143)), go_on="do it again") == 143
    assert exit_status(raising(KeyboardInterrupt()), go_on="do it again") == 130
    assert exit_status(raising(BrokenPipeError()), go_on="do it again") == 1
    assert capsys.readouterr().err.splitlines() == [
        "saved to a.pt",
        "saved to a.pt; do it again",
        "interrupted; do it again",
        "the output was closed; do it again",
    ]
    assert exit_status(raising(ValueError("T is 0")), go_on="do it again") == 1
    assert capsys.readouterr().err == "error: T is 0\n"


@pytest.mark.parametrize(
    ("errors", "shown"), [("strict", b"\\u2713"), ("surrogateescape", b"\\u2713"), ("replace", b"?")]
)
def test_what_stdout_cannot_show_is_escaped(errors: str, shown: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
    assert exit_status(lambda: print("\u2713", end="")) == 0 and written.getvalue() == shown


def test_a_bug_passes() -> None:
    with pytest.raises(TypeError):
        exit_status(raising(TypeError("a bug")))
    with pytest.raises(RuntimeError):
        exit_status(raising(RuntimeError("a bug")))
    assert exit_status(raising(RuntimeError("expected")), expected=(RuntimeError,)) == 1


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("from niels_gpt.command import exit_status; exit(exit_status(lambda: print('x' * 100_000)))", 1),
        ("from niels_gpt.cli import main; exit(main(['--help']))", 0),
    ],
)
def test_a_reader_that_has_gone_is_no_traceback(script: str, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-c", f"input(); {script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(timeout=60) == status and process.stderr.read() == b""


def test_the_compiler_is_imported_by_those_who_compile_only() -> None:
    """It takes as long to import as PyTorch itself, and every start of a program would wait for it."""
    script = "import sys, niels_gpt.chat_cli, niels_gpt.train.run; sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0
