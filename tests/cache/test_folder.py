"""The folder of a cache is whole or the old one: builds that fail, are killed at any step, or meet each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from niels_gpt.cache import integrity
from niels_gpt.cache.folder import LAST_FILE, locked, replacing_folder, sweep_folder, whole_folder
from niels_gpt.cache.format import open_pretrain
from tests.cache.samples import SHA, build_pretrain_cache, build_sft_cache, data_files


def test_a_failing_build_leaves_the_old_cache_alone(root: Path) -> None:
    before = {path: path.read_bytes() for path in data_files(root)}
    for build, name in ((build_pretrain_cache, "n"), (build_sft_cache, "t")):
        with pytest.raises(RuntimeError, match=name), pytest.MonkeyPatch.context() as patch:
            patch.setattr("niels_gpt.cache.writing.write_meta", Mock(side_effect=RuntimeError(name)))
            build(root)
    assert {path: path.read_bytes() for path in data_files(root)} == before
    assert {path.name for path in root.iterdir()} == {"notes", "talk"}


@pytest.mark.parametrize("call", ["write", "flush", "close", "fsync", "rename"])
def test_a_full_disk_is_an_error_that_names_the_file(root: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in data_files(root)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif call == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        real_open = open

        class Full:
            def __init__(self, file: Any) -> None:
                self.file = file

            def __getattr__(self, name: str) -> Any:
                return fail if name == call else getattr(self.file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                self.file.close()
                if call == "close":
                    fail()

        monkeypatch.setattr(integrity, "open", lambda *a: Full(real_open(*a)), raising=False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        build_pretrain_cache(root, 60)
    monkeypatch.undo()
    if call != "rename":
        assert "notes" in str(caught.value.filename)
    assert {path: path.read_bytes() for path in data_files(root)} == before


def killed_at(step: int, root: Path) -> None:
    """Leave `root` as a build of the cache `notes` does when it is killed at a step of its swap."""
    new, old = root / ".notes.new", root / ".notes.old"
    build_pretrain_cache(root / "elsewhere", 60)
    shutil.move(root / "elsewhere" / "notes", new)
    shutil.rmtree(root / "elsewhere")
    (root / ".notes.lock").touch()
    (new / "journal.json").touch()
    if step == 0:  # while writing
        (new / "meta.json.sha256").unlink()
    if step >= 2:  # between the renames
        (root / "notes").rename(old)
    if step >= 3:
        new.rename(root / "notes")
    if step >= 4:  # while deleting
        (old / "meta.json").unlink()


@pytest.mark.parametrize(("step", "tokens"), [(0, 310), (1, 310), (2, 62), (3, 62), (4, 62)])
def test_a_build_killed_at_any_point_leaves_a_whole_cache(root: Path, step: int, tokens: int) -> None:
    killed_at(step, root)

    def opened() -> int:
        return open_pretrain(root, "notes", "train", tokenizer_sha256=SHA, vocab_size=512, verify=True).num_tokens

    assert opened() == tokens
    with locked(root / "notes"):
        sweep_folder(root / "notes")
    assert opened() == tokens
    assert {path.name for path in root.iterdir()} == {"notes", "talk"} and not list(root.rglob("journal*"))
    build_pretrain_cache(root, 90)
    assert opened() == 93


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_the_next_build_takes_over_from_a_killed_one(root: Path, step: int) -> None:
    killed_at(step, root)
    build_pretrain_cache(root, 120)
    assert open_pretrain(root, "notes", "train", tokenizer_sha256=SHA, vocab_size=512).num_tokens == 124
    assert {path.name for path in root.iterdir()} == {"notes", "talk"} and not list(root.rglob("journal*"))


def test_a_deleted_cache_does_not_come_back_from_rubbish(root: Path) -> None:
    shutil.move(root / "notes", root / ".notes.old")
    (root / ".notes.new").mkdir()
    (root / ".notes.new" / "journal.json").touch()  # a build that was killed long after
    assert not whole_folder(root / "notes").exists()
    sweep_folder(root / "notes")
    assert {path.name for path in root.iterdir()} == {"talk"}


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").touch()
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".new":
            raise PermissionError(13, "denied")
        return real(self, to)

    with pytest.raises(PermissionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with replacing_folder(target):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "old"]


@pytest.mark.parametrize("stale_link", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, stale_link: bool) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "x"
    real.mkdir(parents=True)
    link.symlink_to(Path("disk") / "real", target_is_directory=True)
    (tmp_path / "disk" / "kept").mkdir()
    if stale_link:
        (tmp_path / "disk" / ".real.old").symlink_to("kept", target_is_directory=True)
        (tmp_path / ".x.old").symlink_to("disk/kept", target_is_directory=True)
    for name in ("first", "second", "third"):
        with replacing_folder(link) as new:
            assert new.parent == tmp_path / "disk"  # the same disk, or no rename could put it there
            assert (tmp_path / "disk" / ".real.lock").is_file()  # whoever comes by the real name waits, too
            (new / name).touch()
        assert link.is_symlink() and [path.name for path in real.iterdir()] == [name]
        assert {path.name for path in tmp_path.rglob("*")} == {"x", "disk", "real", "kept", name}
    shutil.move(real, tmp_path / "disk" / ".real.old")  # killed between the renames
    (tmp_path / "disk" / ".real.new").mkdir()
    (tmp_path / "disk" / ".real.new" / LAST_FILE).touch()
    assert whole_folder(link) == tmp_path / "disk" / ".real.new"
    sweep_folder(link)
    assert link.is_symlink() and [path.name for path in link.iterdir()] == [LAST_FILE]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can make files")
def test_where_no_files_can_be_made_nobody_waits_for_ever() -> None:
    code = "from pathlib import Path; from niels_gpt.cache.folder import locked\nwith locked(Path('/proc/x')): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no files can be made in this folder: '/proc'" in done.stderr


def test_a_second_builder_says_who_builds_and_waits(tmp_path: Path) -> None:
    target = tmp_path / "x"
    code = (
        "import sys; from pathlib import Path; from niels_gpt.cache.folder import replacing_folder\n"
        f"with replacing_folder(Path({str(target)!r})) as new: (new / 'second').touch()"
    )
    with replacing_folder(target) as new:
        (new / "first").touch()
        second = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        said = second.stderr.readline()
    assert f"x is being built by process {os.getpid()} on " in said and "waiting" in said
    assert second.wait(60) == 0
    assert [path.name for path in target.iterdir()] == ["second"] and [p.name for p in tmp_path.iterdir()] == ["x"]
