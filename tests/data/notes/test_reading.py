"""Folders of notes with odd names, links, broken files and missing rights: what is read, what is said of the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.data.notes import vault as vaults
from niels_gpt.data.notes.report import remarks
from niels_gpt.special_tokens import SPECIAL_TOKENS
from tests.data.notes.test_vault import report_on, settings_for


def test_what_cannot_be_read_is_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("All is well in this one.")
    (tmp_path / "latin.md").write_bytes("café".encode("latin-1"))
    (tmp_path / "binary.md").write_bytes(b"a\0b")
    (tmp_path / "blank.md").write_text(" \n\t\n")
    (tmp_path / "markup.md").write_text("![[picture.png]]\n%% hidden %%")
    (tmp_path / "half.md").write_bytes(b"\xff\xfea")
    (tmp_path / "big.md").write_text("x" * 200)
    (tmp_path / "control.md").write_text(f"this is {SPECIAL_TOKENS['sys']} indeed")
    (tmp_path / "outside.md").symlink_to("/etc/hostname")
    (tmp_path / "nowhere.md").symlink_to("gone.md")
    (tmp_path / "self.md").symlink_to("self.md")
    (tmp_path / "same.md").symlink_to("good.md")
    for folder in (".obsidian", ".trash", "logseq/bak"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "old.md").write_text("thrown away")
    (tmp_path / "more.txt").write_text("not markdown")
    report, _ = report_on(settings_for(tmp_path, max_file_bytes=150))
    assert {reason: {one["name"]: one["detail"] for one in found} for reason, found in report["dropped"].items()} == {
        "not UTF-8": {"latin.md": "byte 3"},
        "not UTF-16": {"half.md": "byte 2"},
        "binary": {"binary.md": ""},
        "empty": {"blank.md": ""},
        "no text": {"markup.md": ""},
        "too big": {"big.md": "over data.notes.max_file_bytes = 150"},
    }
    assert {one["name"]: one["detail"] or one["reason"] for one in report["skipped"]} == {
        "outside.md": "leads out of the folder",
        "nowhere.md": "leads nowhere",
        "self.md": "loops",
        "same.md": "leads to another place in the folder",
        ".obsidian/old.md": "app folder",
        ".trash/old.md": "app folder",
        "logseq/bak/old.md": "app folder",
    }
    assert report["kept"]["documents"] == 2 and report["other_files"] == {".txt": 1}
    said = remarks(report, "roam")
    assert any("control.md spells a special token" in remark for remark in said)
    assert any("--source text" in remark for remark in said)


def test_a_file_that_vanishes_or_may_not_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.md", "b.md", "c.md"):
        (tmp_path / name).write_text(f"text of {name}")
    found = vaults.find_files

    def find_then_lose(*args: Any, **options: Any) -> list[Path]:
        paths = found(*args, **options)
        (tmp_path / "a.md").unlink(missing_ok=True)
        (tmp_path / "b.md").unlink(missing_ok=True)
        (tmp_path / "b.md").mkdir(exist_ok=True)  # to open a folder fails for root as well
        return paths

    monkeypatch.setattr(vaults, "find_files", find_then_lose)
    vault = vaults.scan(tmp_path, ["*.md"], settings_for(tmp_path).data.notes, setting="here", hidden=True)
    assert [note.reason for note in vault.notes] == ["vanished", "unreadable", ""]


def as_nobody(work: Callable[[], object]) -> Any:
    """What `work` returns, or the text of its OSError, in a child without the rights of root, as JSON."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                said = work()
            except OSError as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(said).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs rights as Unix has them")
def test_folders_without_permission_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be listed but not entered (644), or neither (000); nobody may read, wherever tests are run."""
    monkeypatch.chdir(tmp_path)  # the folders above are perhaps root's own; the child stays here
    for name in ("a.md", "listed/d.md", "listed/more/e.md", "closed/f.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"A text of its own, called {name}.")
    (tmp_path / "link.md").symlink_to("closed/f.md")
    folders = {"listed": 0o644, "closed": 0o000}
    tmp_path.chmod(0o755)

    def seen(folder: str = ".") -> dict[str, list[str]]:
        report, vault = report_on(settings_for(Path(folder)))
        skipped = [f"{one['name']}: {one['reason']} {one['detail']}" for one in report["skipped"]]
        return {"read": [vault.notes[i].name for i in vault.kept], "skipped": skipped}

    assert len(seen()["read"]) == 4  # and what is imported on the way, is
    try:
        for name, mode in folders.items():
            (tmp_path / name).chmod(mode)
        found, alone = as_nobody(seen), [as_nobody(lambda name=name: seen(name)) for name in folders]
    finally:
        for name in folders:
            (tmp_path / name).chmod(0o755)
    assert found["read"] == ["a.md"]
    assert found["skipped"] == [
        "closed: unreadable Permission denied",
        "link.md: link leads to a place that cannot be read",
        "listed/d.md: unreadable Permission denied",
        "listed/more: unreadable Permission denied",
    ]
    for said, place in zip(alone, ("listed/", "closed cannot"), strict=True):
        assert said.startswith(f"PermissionError: {place}") and "cannot be read (Permission denied)" in said


def test_odd_names_are_read_and_not_called_unread(tmp_path: Path) -> None:
    """A `#` in a name is no record of a JSON lines file, capitals are read as well, and what is not UTF-8 is told."""
    names = [b"C# notes.md", b"UP.MD", b"bad\xff.md", b"sub/In.Md", b".hidden/x.md", b".obsidian/s\xff.md"]
    for number, name in enumerate(names):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Note {number} tells of something else, {number * 7919} in all.")
    report, vault = report_on(settings_for(tmp_path))
    assert [note.name for note in vault.notes] == [".hidden/x.md", "C# notes.md", "UP.MD", "bad?.md", "sub/In.Md"]
    assert report["other_files"] == {} and not any("not read" in remark for remark in remarks(report, "roam"))
    assert report["skipped"] == [{"name": ".obsidian/s?.md", "reason": "app folder", "detail": ""}]
    json.dumps(report, ensure_ascii=False).encode()
    for name in ("a.TXT", "b.markdown", "c.htm", "d.Ndjson", "e.png"):
        (tmp_path / name).write_text(json.dumps({"text": f"A file of another kind, which is called {name}."}))
    report, _ = report_on(settings_for(tmp_path))
    assert report["other_files"] == {".htm": 1, ".markdown": 1, ".ndjson": 1, ".txt": 1}
    _, vault = report_on(settings_for(tmp_path, "text"), "text")  # the advice of the remark
    assert {Path(note.name.partition("#")[0]).suffix.lower() for note in vault.notes if not note.reason} >= {
        *report["other_files"]
    }
