"""CONTRIBUTING.md's first change, made in a copy of the checkout with its own commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from niels_gpt.paths import PROJECT_ROOT as ROOT

COPIED = ("niels_gpt", "train", "scripts", "tools", "tests", "configs", "data", "docs")


def block(page: str, language: str) -> str:
    """The first block of a language, without its indentation."""
    found = re.search(rf"^ *```{language}\n(.*?)^ *```", page, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"CONTRIBUTING.md has no block of {language}"
    return textwrap.dedent(found[1])


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The copy, its primer longer by what the page says, and the commands to run then."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        own = ("cache", ".roam-data") if name == "data" else ()  # what a working copy may hold beside what is shipped
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", *own))
    shutil.copy(ROOT / "pyproject.toml", folder)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    with open(folder / "data" / "primer.txt", "a", encoding="utf-8") as primer:
        primer.write(block(page, "text"))
    return folder, [line.partition("  #")[0].strip() for line in block(page, "bash").splitlines()]


def run(line: str, folder: Path) -> None:
    program, *arguments = shlex.split(line)
    start = {".venv/bin/python": [], ".venv/bin/pytest": ["-m", "pytest"]}[program]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_first_change_passes_the_tests_it_names(changed: tuple[Path, list[str]]) -> None:
    folder, (convert, check, regenerate) = changed
    before = (folder / "data" / "primer.jsonl").read_text(encoding="utf-8")
    run(convert, folder)
    after = (folder / "data" / "primer.jsonl").read_text(encoding="utf-8")
    assert after.startswith(before) and len(after.splitlines()) == len(before.splitlines()) + 1
    run(check, folder)
    assert regenerate == ".venv/bin/python -m tests.walkthrough"


@pytest.mark.soak
def test_the_walkthrough_holds_again(changed: tuple[Path, list[str]]) -> None:
    """After the page's last command, and not before."""
    folder, (convert, _, regenerate) = changed
    check = ".venv/bin/pytest tests/test_walkthrough.py"
    run(convert, folder)
    with pytest.raises(AssertionError, match="writes what is printed into the page"):
        run(check, folder)
    run(regenerate, folder)
    run(check, folder)
