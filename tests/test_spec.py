"""docs/spec.md names only what exists and has a row for every item; and what of it no other test shows."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import paths
from niels_gpt.config import NEW, ModelConfig, TrainConfig
from niels_gpt.model import GPT
from niels_gpt.optim import build_optimizer
from niels_gpt.settings import default_settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "docs" / name for name in ("spec.md", "troubleshooting.md", "walkthrough.md")]
FOLDERS = "niels_gpt|tests|tools|scripts|train|configs"
PLACE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)(?:::?([\w.]+))?`")


@cache
def names_in(path: Path) -> set[str]:
    """Everything a Python file defines at its top level and in its classes, or imports (a package's public names)."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{item.name}" for item in ast.walk(node) if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def missing(text: str) -> list[str]:
    """The places a document names that are not there."""
    gone = []
    for path, name in PLACE.findall(text):
        there = (ROOT / path).exists()
        if not there or (name and name not in names_in(ROOT / path)):
            gone.append(f"{path}:{name}" if name else path)
    return gone


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_everything_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert len(PLACE.findall(text)) > 10
    assert not missing(text)
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(name in names_in(path) for path in (ROOT / "tests").rglob("test_*.py")), name


def test_what_is_not_there_is_found() -> None:
    text = "`niels_gpt/nowhere.py`, `niels_gpt/rng.py:seed_for`, `niels_gpt/rng.py:sow`, `tests/test_rng.py::test_x`"
    assert missing(text) == ["niels_gpt/nowhere.py", "niels_gpt/rng.py:sow", "tests/test_rng.py:test_x"]


def test_every_item_has_its_row() -> None:
    text = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+[a-h]?|B\d) \|", text, flags=re.MULTILINE)
    numbered = [str(n) for n in range(1, 139)]
    assert rows == [*numbered, *(f"138{letter}" for letter in "abcdefgh"), *(f"B{n}" for n in range(1, 8))]


def test_rows_name_a_home_and_a_test() -> None:
    """Every item has a home in the tree and a test, unless its row says why not."""
    without = {"3", "138"}  # uv's resolver; a claim that is not made
    for line in (ROOT / "docs" / "spec.md").read_text(encoding="utf-8").splitlines():
        if (row := re.match(r"\| (\d+[a-h]?|B\d) \|", line)) and row[1] not in without:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 5, line
            assert PLACE.search(cells[2]) or "](" in cells[2] or "pyproject" in cells[2], line
            assert "tests/" in cells[3] or "suite itself" in cells[3], line


def test_items_have_tests_that_need_no_published_vectors() -> None:
    for line in (ROOT / "docs" / "spec.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| (\d+[a-h]?|B\d) \|", line):
            tests = re.findall(r"`(tests/[\w/]+\.py)::([\w.]+)`", line)
            assert not tests or not all(needs_vectors(ROOT / path, name) for path, name in tests), row[1]


@cache
def needs_vectors(path: Path, name: str) -> bool:
    """Whether a test skips where the published vectors are absent."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner, _, own = name.rpartition(".")
    holders: list[ast.Module | ast.ClassDef] = [tree]
    holders += [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    marks: list[ast.AST] = []
    for holder in holders:
        marks += getattr(holder, "decorator_list", [])
        for node in holder.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                marks.append(node.value)
            if isinstance(node, ast.FunctionDef) and node.name == own and holder is holders[-1]:
                marks += node.decorator_list
    return any("needs_bundle" in ast.unparse(mark) for mark in marks)


def test_marks_of_a_test_its_class_and_its_file_are_seen(tmp_path: Path) -> None:
    one = "class TestA:\n    def test_x(self): ...\n    @needs_bundle\n    def test_y(self): ...\n"
    for i, (text, wanted) in enumerate(
        (
            (one, [False, True]),
            (f"@needs_bundle\n{one}", [True, True]),
            (f"pytestmark = [needs_bundle]\n{one}", [True, True]),
            (one.replace(":\n", ":\n    pytestmark = needs_bundle\n", 1), [True, True]),
        )
    ):
        path = tmp_path / f"{i}.py"
        path.write_text(text)
        assert [needs_vectors(path, f"TestA.test_{which}") for which in "xy"] == wanted


# what no other test shows


PUBLISHED_FIELDS = {
    ModelConfig: "V T C L H d_ff dropout rope_theta",
    TrainConfig: (
        "seed B total_steps eval_every eval_steps log_every ckpt_every base_lr warmup_steps min_lr grad_clip "
        "accum_steps amp amp_dtype activation_checkpointing optimizer beta1 beta2 weight_decay eps micro_B_eval "
        "eval_batches decay_norm_and_bias decay_embeddings save_best best_metric best_metric_weights"
    ),
}


@pytest.mark.parametrize("record", PUBLISHED_FIELDS)
def test_configs_have_no_defaults(record: type[Any]) -> None:
    names = PUBLISHED_FIELDS[record].split()
    assert [field.name for field in dataclasses.fields(record)] == names
    with pytest.raises(TypeError, match=f"missing {len(names)} required positional arguments"):
        record()
    made = record(**{name: 1 if name == "H" else 2 for name in names})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, names[0], 3)


def test_ensure_dirs_makes_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths.ensure_dirs()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "configs"]


def test_what_decays() -> None:
    """Published, `decay_norm_and_bias` went by names that no norm had; here it goes by shape."""
    model = GPT(ModelConfig(V=32, T=8, C=16, L=1, H=2, d_ff=32, dropout=0.0, rope_theta=1e4), NEW)
    options = default_settings().training.pretrain
    vectors = {id(p) for p in model.parameters() if p.ndim < 2}

    def spared(**changes: bool) -> set[int]:
        optimizer = build_optimizer(model, options.model_copy(update=changes))
        assert isinstance(optimizer, torch.optim.AdamW)
        (first, *_) = optimizer.param_groups
        assert (first["betas"], first["eps"], first["lr"]) == (options.betas, options.eps, options.base_lr)
        return {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}

    assert spared() == set()
    assert spared(decay_norm_and_bias=False) == vectors != set()
    assert spared(decay_embeddings=False) == {id(model.tok_emb.weight)}


def texts_of_the_code() -> str:
    """Every text in the package, its placeholders replaced by a blank line."""
    found = []
    for path in (ROOT / "niels_gpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\n\n" for v in node.values)
                found.append("".join(str(part) for part in parts))
    return "\n\n".join(found)


def test_quoted_messages_are_those_of_the_code() -> None:
    """What troubleshooting.md quotes in its first column; PATH, N, T and dots stand for what varies."""
    text, said = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), texts_of_the_code()
    cells = re.findall(r"^\| ([^|]*?) \|", text, flags=re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    pieces = [p.strip(" :'") for message in quoted for p in re.split(r"\.\.\.|PATH|\b[NT]\b(?! or)|cuda", message)]
    wanted = [piece.removeprefix("warning: ") for piece in pieces if len(piece) > 10]
    assert len(wanted) > 12
    assert not [piece for piece in wanted if piece not in said]
