"""Files are replaced whole or not at all."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from niels_gpt import files


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == files.sha256_bytes(content) == hashlib.sha256(content).hexdigest()


def test_writing_makes_folders_and_leaves_one_file(tmp_path):
    path = tmp_path / "x" / "y" / "a.txt"
    for text in ("eins\r\n", "zwei ü"):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode()
        assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old_content_and_no_temporary(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), files.atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def test_the_old_content_stays_visible_until_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_the_order_is_write_sync_rename_sync_folder(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    path = tmp_path / "a"

    def fsync(handle):
        done.append("folder" if os.fstat(handle).st_ino == tmp_path.stat().st_ino else os.fstat(handle).st_size)
        real_fsync(handle)

    def replace(source, target):
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_bytes(path, b"12345")
    assert done == [5, "rename", "folder"]


def test_json_round_trip(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, True], "a": "ü🦉"}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_text(encoding="utf-8").startswith('{\n  "a": "ü🦉"') and path.read_bytes().endswith(b"}\n")
    path.write_bytes(b"\xef\xbb\xbf{}")  # a byte order mark, as some editors write it
    assert files.read_json(path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": object()}])
def test_what_is_not_json_is_not_written(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        files.write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1"),
        (b'{"a": 1,\n "b": }', "line 2"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' appears twice"),
        (b"\xff\xfe", "codec"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_json_errors_name_the_file_and_the_place(tmp_path, content, said):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON") as caught:
        files.read_json(path)
    assert said in str(caught.value)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


@pytest.mark.parametrize("link", [True, False])
def test_publish_copy(tmp_path, monkeypatch, link):
    if not link:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "other filesystem")))
    source, target = tmp_path / "source", tmp_path / "target"
    for content in (b"one", b"two"):
        files.write_bytes(source, content)
        for _ in range(2):  # publishing what is already there changes nothing
            files.publish_copy(source, target)
            assert target.read_bytes() == content
            assert source.samefile(target) == link
    files.write_bytes(source, b"three")
    assert target.read_bytes() == b"two", "replacing the source changed the copy"
    assert names(tmp_path) == ["source", "target"]
    with pytest.raises(FileNotFoundError):
        files.publish_copy(tmp_path / "none", target)
    assert target.read_bytes() == b"two" and names(tmp_path) == ["source", "target"]


def test_sweeping_removes_what_dead_writers_left_and_nothing_else(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as finished:
        finished.wait()
    dead = tmp_path / f".a.pt.{finished.pid}.0123abcd.tmp"
    own = files.temporary_beside(tmp_path / "b.pt")
    alive = tmp_path / f".c.pt.{os.getppid()}.0123abcd.tmp"
    strange = [tmp_path / name for name in (".x.tmp", "a.1.0123abcd.tmp", f".a.{finished.pid}.0123abcd.pt", "data")]
    for path in (dead, own, alive, *strange):
        path.touch()
    assert sorted(files.sweep_temporaries(tmp_path)) == sorted([dead, own])
    assert names(tmp_path) == sorted(p.name for p in (alive, *strange))
    assert files.sweep_temporaries(tmp_path / "none") == []


def test_temporaries_of_one_file_do_not_clash(tmp_path):
    assert len({files.temporary_beside(tmp_path / "a") for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, ""), True),
        (OSError(errno.EDQUOT, ""), True),
        (OSError(errno.EFBIG, ""), True),
        (OSError(errno.EIO, ""), False),
        (PermissionError(errno.EACCES, ""), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("something else"), False),
        (ValueError("unexpected pos"), False),
    ],
)
def test_the_disguises_of_a_full_disk(error, full):
    assert files.is_disk_full(error) is full
