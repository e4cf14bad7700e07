"""Runs the real sources in a process of its own, since the Hugging Face libraries read their environment only once.

    worker = Worker(hub.url, home, offline=False)
    worker.ask(do="texts", source="wikitext", split="val")

One process answers many questions; importing the libraries takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import runpy
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """What the worker raised: the name of the exception and its text."""


class Worker:
    """A process with HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE set; `said` is what it last wrote to stderr or stdout."""

    def __init__(self, url: str, home: Path, *, offline: bool) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
        self.said = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **inherited,
                **settings,
                "PYTHONPATH": str(ROOT),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
            },
        )

    def ask(self, **question: Any) -> Any:
        """The answer; Failed if it was an exception."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the worker died"
        answer = json.loads(line)
        self.said = answer["said"]
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0, "the worker did not end well"


def _answer(question: dict[str, Any]) -> Any:
    import huggingface_hub.constants

    from niels_gpt.data import hub
    from niels_gpt.data.registry import get_source
    from niels_gpt.settings import validate_overrides

    hub.STREAM_RETRIES = 1
    huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT = question.get("timeout", 10)
    if question.get("forget", True):
        hub.forget()
    if question["do"] == "command":
        return _command(question["line"], question["cwd"], question["typed"], question.get("token"))
    settings = validate_overrides({"data": question.get("data", {}), **question.get("settings", {})})
    take = question.get("take")
    if question["do"] == "round_trip":
        return _round_trip(question["name"], question["path"], bytes.fromhex(question["content"]), question["token"])
    if question["do"] == "program":
        return _program(question["module"], question["argv"], question["cwd"], question.get("token"))
    if question["do"] == "smoke":
        from scripts import smoke_loaders

        return smoke_loaders.main([])
    source = get_source(question["source"])
    if question["do"] == "describe":
        return source.describe(settings, "pretrain")
    if question["do"] == "texts":
        found = source.documents(settings, question["split"]) if source.documents else source.stream(settings)
        return [document.text for document in itertools.islice(found, take)]
    chats = itertools.islice(source.chats(settings, "all"), take)
    return [[(message.role, message.content) for message in chat.messages] for chat in chats]


def _round_trip(name: str, path: str, content: bytes, token: str) -> list[str]:
    """Upload a file to a new model repository and download it again: the commit of both, and what came back, as hex."""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi(token=token or False)
    api.create_repo(name, exist_ok=True)
    commit = api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=name)
    back = Path(hf_hub_download(name, path))
    return [commit.oid, back.parent.name, back.read_bytes().hex()]


def _program(module: str, argv: list[str], cwd: str, token: str | None) -> int:
    """The exit status of a program's main in a folder, as a user with this token."""
    os.chdir(cwd)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    status: int = importlib.import_module(module).main(argv)
    return status


def _command(line: str, cwd: str, typed: str, token: str | None) -> int:
    os.chdir(cwd)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    return run_command(line, typed)


def run_command(line: str, typed: str) -> int:
    """The exit status of `python ...` or `niels-gpt ...`, run in this process; `typed` is its standard input."""
    program, *arguments = shlex.split(line)
    if program == "niels-gpt":
        arguments = ["-m", "niels_gpt.cli", *arguments]
    elif program != "python":
        raise ValueError(f"not a command of this project: {line}")
    before = sys.argv, sys.stdin, sys.path[:]
    sys.stdin = io.StringIO(typed)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a module that was imported runs again as __main__
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        sys.argv, sys.stdin, sys.path[:] = before
    return 0


def _serve() -> None:
    answers, real_sleep = sys.stdout, time.sleep
    time.sleep = lambda seconds: real_sleep(min(seconds, 0.01))  # the libraries' waits between tries
    for line in sys.stdin:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                answer = {"result": _answer(json.loads(line))}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**answer, "said": said.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
