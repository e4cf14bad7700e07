"""Runs the snippets of docs/walkthrough.md; `python -m tests.walkthrough` writes their outputs into the page.

A `python` block runs in one namespace with all before it, a `bash` block line by line in the same process and folder. A
`text` block holds what the block before it printed, or of that the lines in which the pattern after `text` is found.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.hub.worker import run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "walkthrough.md"
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
UNSTEADY = (  # what differs from run to run or machine to machine, and what stands for it
    (r"\d+\.\d+ s\b", "0.0 s"),
)


def run(page: str, folder: Path) -> list[tuple[str, str]]:
    """(code, output) of every block that runs, in order; what a block raises goes on."""
    names: dict[str, Any] = {}
    done = []
    with contextlib.chdir(folder):
        for language, _, code in FENCE.findall(page):
            if language not in ("python", "bash"):
                continue
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                if language == "python":
                    exec(compile(code, f"{PAGE.name}: {code.splitlines()[0]}", "exec"), names)
                else:
                    for line in code.splitlines():
                        status = run_command(line, "")
                        assert status == 0, f"{line}: exit {status}\n{said.getvalue()}"
            done.append((code, said.getvalue()))
    return done


def expected(page: str) -> list[tuple[str, str | None, str]]:
    """(code, the text block after it or None, its pattern) of every block that runs."""
    found: list[tuple[str, str | None, str]] = []
    for language, pattern, body in FENCE.findall(page):
        if language in ("python", "bash"):
            found.append((body, None, ""))
        elif language == "text":
            found[-1] = (found[-1][0], body, pattern.strip())
    return found


def chosen(output: str, pattern: str) -> str:
    """The lines of an output that a page shows."""
    return "".join(line for line in output.splitlines(keepends=True) if re.search(pattern, line))


def steady(text: str) -> str:
    """The text without what no two runs have in common."""
    for pattern, instead in UNSTEADY:
        text = re.sub(pattern, instead, text)
    return text


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        outputs = dict(run(page, Path(folder)))
    code = ""

    def fill(block: re.Match[str]) -> str:
        nonlocal code
        language, pattern, body = block.groups()
        if language == "text":
            body = chosen(outputs[code], pattern.strip())
        code = body
        return f"```{language}{pattern}\n{body}```"

    PAGE.write_text(FENCE.sub(fill, page), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
