"""The README and the documents say nothing that is not there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from niels_gpt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_the_map_has_every_file_and_no_other() -> None:
    listed = re.findall(r"^\| `([\w/.]+\.py)` \|", README, flags=re.MULTILINE)
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "niels_gpt").rglob("*.py") if p.name != "__init__.py"}
    tools = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tools").glob("*.py")}
    scripts = {p.relative_to(ROOT).as_posix() for p in (ROOT / "scripts").glob("*.py") if p.name != "__init__.py"}
    assert sorted(listed) == sorted(package | tools | scripts)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for command in re.findall(r"(?:`|^)niels-gpt ([a-z][\w-]*)", text, flags=re.MULTILINE):
        assert command in COMMANDS, f"{document.name} names the unknown command niels-gpt {command}"
    for script in re.findall(r"python ((?:tools|scripts)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), f"{document.name} names {script}, which is not there"
    for config in re.findall(r"(configs/[\w.]+\.(?:json|txt))", text):
        assert (ROOT / config).is_file(), f"{document.name} names {config}, which is not there"
    targets = re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_no_placeholder_is_left() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"@@|TODO|TBD", document.read_text(encoding="utf-8")), document.name


def test_ci_runs_the_whole_proof_everywhere() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    assert set(matrix["python"]) == {"3.11", "3.12"}
    assert job["steps"][-1]["run"] == ".ci/run" and os.access(ROOT / ".ci/run", os.X_OK)
