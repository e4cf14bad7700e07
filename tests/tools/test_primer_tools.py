"""The primer tools: the text converter and the generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt.data.primer import read_chat_jsonl, read_primer_txt

ROOT = Path(__file__).resolve().parents[2]
CONVERT, GENERATE = "convert_primer_txt_to_jsonl.py", "generate_primer.py"


def run_tool(name: str, *args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a tool as a person would from a bare checkout."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_convert_writes_the_shipped_jsonl(tmp_path: Path) -> None:
    done = run_tool(CONVERT, "--input", "data/primer.txt", "--output", tmp_path / "new" / "p.jsonl")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "p.jsonl").read_bytes() == (ROOT / "data" / "primer.jsonl").read_bytes()


def test_convert_reports_in_one_line_and_keeps_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("user: a\nassistant: b\n\n<dialogue>\n\nuser: c\n")
    (tmp_path / "out.jsonl").write_text("old")
    done = run_tool(CONVERT, "--input", tmp_path / "bad.txt", "--output", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "dialogue 2, line 6" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert run_tool(CONVERT, "--input", tmp_path / "none.txt", "--output", tmp_path / "out.jsonl").returncode == 1


def test_generator_is_deterministic_and_well_formed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = run_tool(GENERATE, "--out", tmp_path / name, "--seed", seed, "--shuffle", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert (tmp_path / "a").read_bytes().endswith(b"\n")
    dialogues = read_primer_txt(tmp_path / "a")
    assert len(dialogues) == 210
    assert len({messages[1]["content"] for messages in dialogues}) == 210  # 30 prompts a category, none twice
    assert all([m["role"] for m in messages] == ["system", "user", "assistant"] for messages in dialogues)
    assert not any("{" in m["content"] for messages in dialogues for m in messages)


@pytest.mark.parametrize("count", [1, 40])
def test_generator_counts_per_category(tmp_path: Path, count: int) -> None:
    assert run_tool(GENERATE, "--out", tmp_path / "p.txt", "--n-per-category", count).returncode == 0
    assert len(read_primer_txt(tmp_path / "p.txt")) == 7 * count


def test_generated_text_converts(tmp_path: Path) -> None:
    run_tool(GENERATE, "--out", tmp_path / "p.txt")
    assert run_tool(CONVERT, "--input", tmp_path / "p.txt", "--output", tmp_path / "p.jsonl").returncode == 0
    assert len(list(read_chat_jsonl(tmp_path / "p.jsonl"))) == 210


def test_generator_explains_missing_and_bad_facts(tmp_path: Path) -> None:
    done = run_tool(GENERATE, "--facts", tmp_path / "none.json", "--out", tmp_path / "p.txt")
    assert done.returncode == 1
    assert "data/public_facts.json" in done.stderr and done.stderr.count("\n") == 1
    facts = json.loads((ROOT / "data" / "public_facts.json").read_text(encoding="utf-8"))
    facts["nav"][1].pop("path")
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    done = run_tool(GENERATE, "--facts", tmp_path / "facts.json", "--out", tmp_path / "p.txt")
    assert done.returncode == 1 and "nav[1]" in done.stderr
    facts["nav"][1].update(path="x", fact="user: tags are not allowed")
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    done = run_tool(GENERATE, "--facts", tmp_path / "facts.json", "--out", tmp_path / "p.txt")
    assert done.returncode == 1 and "may not contain" in done.stderr
    assert not (tmp_path / "p.txt").exists()


def test_facts_file_has_the_documented_keys() -> None:
    facts = json.loads((ROOT / "data" / "public_facts.json").read_text(encoding="utf-8"))
    assert set(facts) == {"source", "nav", "projects_preview", "skills", "contact", "personal"}
    done = run_tool(GENERATE, "--n-per-category", 0)
    assert done.returncode == 2 and "at least 1" in done.stderr


def test_files_the_facts_point_at_exist() -> None:
    facts = json.loads((ROOT / "data" / "public_facts.json").read_text(encoding="utf-8"))
    paths = [entry["path"] for entry in facts["nav"] if entry["path"] != "README.md"]
    assert [path for path in paths if not (ROOT / path).is_file()] == []
