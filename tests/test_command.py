"""Every program ends alike: 0, 1 with a sentence, 130 for Ctrl-C; bugs stay visible."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from niels_gpt.command import Interrupted, exit_status

ROOT = Path(__file__).resolve().parents[1]


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
        ("from niels_gpt.cli import main; exit(main(['settings', '--help']))", 0),
        ("from niels_gpt.cli import main; exit(main(['settings']))", 0),
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


@pytest.mark.parametrize(
    ("program", "library", "said"),
    [("niels_gpt.cli", "try: {}\nexcept: pass", ""), ("train.run", "{}", "interrupted\n")],
    ids=["niels-gpt", "train.run"],
)
def test_ctrl_c_while_libraries_load_is_no_traceback(tmp_path: Path, program: str, library: str, said: str) -> None:
    (tmp_path / "torch.py").write_text("import signal\n" + library.format("signal.raise_signal(signal.SIGINT)"))
    done = subprocess.run(
        [sys.executable, "-m", program, "train", "--help"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", said)


def test_the_table_of_programs_loads_without_pytorch() -> None:
    script = "import sys, niels_gpt.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("closed", "arguments", "status"),
    [
        (">&-", "", 0),
        ("<&- >&- 2>&-", "settings", 0),
    ],
)
def test_a_stream_that_was_closed_from_the_start_is_an_empty_one(
    tmp_path: Path, closed: str, arguments: str, status: int
) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m niels_gpt.cli {arguments} {closed}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "") and "Traceback" not in done.stderr


def test_what_is_opened_next_does_not_get_the_number_of_a_closed_stream() -> None:
    script = "from niels_gpt.command import open_streams; open_streams(); exit(open('/dev/null').fileno())"
    done = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "{script}" <&- >&- 2>&-'], cwd=ROOT, check=False)
    assert done.returncode == 3


def test_the_compiler_is_imported_by_those_who_compile_only() -> None:
    """It takes as long to import as PyTorch itself, and every start of a program would wait for it."""
    script = "import sys, niels_gpt.chat_cli, niels_gpt.train.run; sys.exit('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 0
