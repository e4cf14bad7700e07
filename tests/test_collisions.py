"""The scan for sentinel literals in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt.collisions import main, scan_file
from niels_gpt.special_tokens import SPECIAL_TOKENS
from tests.reference import BUNDLE, needs_bundle

ROOT = Path(__file__).resolve().parents[1]
USR, EOT = SPECIAL_TOKENS["usr"], SPECIAL_TOKENS["eot"]


def test_one_line_per_colliding_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "deep" / ".hidden" / "a.md").write_text(f"h\u00e9llo {USR} tail {EOT}\n", encoding="utf-8")
    (tmp_path / "b.bin").write_bytes(b"\xff\x00" * 50 + EOT.encode() + b"\xff")
    (tmp_path / "fine.txt").write_text(USR[:-1] + " " + EOT.upper())
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert main(["--roots", str(tmp_path), str(tmp_path / "b.bin")]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{tmp_path / 'b.bin'}: token={EOT} byte_offset=100 char_offset=100 snippet='{EOT}")
    path = tmp_path / "deep" / ".hidden" / "a.md"
    assert lines[1].startswith(f"{path}: token={USR} byte_offset=7 char_offset=6 snippet='{USR} tail ")
    assert all(line.endswith("'") for line in lines)
    assert "4 files scanned" in said.err


def test_nothing_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert main(["--roots", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no special token collisions detected.\n"


def test_a_tokenizer_names_its_sentinels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("spm.model", "spm.vocab", "tokenizer_meta.json"):
        (tmp_path / name).write_text(EOT)
    assert main(["--roots", str(tmp_path)]) == 0
    assert main(["--roots", str(tmp_path), str(tmp_path / "spm.vocab")]) == 1  # asked for by name
    assert capsys.readouterr().out.count("token=") == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_utf16_files_are_seen(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"abc {EOT}".encode(encoding))
    found = scan_file(path)
    assert found is not None and (found.token, found.char_offset) == (EOT, 4)
    bom = 2 if encoding == "utf-16" else 0
    assert found.byte_offset == bom + 2 * 4


@needs_bundle
def test_published_collision(tmp_path: Path) -> None:
    published = json.loads((BUNDLE / "v2" / "collision.json").read_text(encoding="utf-8"))
    path = tmp_path / "a.txt"
    path.write_text(published["text"], encoding="utf-8")
    found = scan_file(path)
    assert found is not None
    assert {key: getattr(found, key) for key in published["result"]} == published["result"]


def test_missing_roots_are_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--roots", str(tmp_path / "nowhere")])
    assert leave.value.code == 2 and "there is no" in capsys.readouterr().err


def test_this_project_has_none_outside_its_home() -> None:
    done = subprocess.run(
        [sys.executable, "tools/scan_special_collisions.py", "--roots", "data", "configs", "niels_gpt", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "no special token collisions detected.\n"), done.stdout + done.stderr
