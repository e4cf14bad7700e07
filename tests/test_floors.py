"""Imports point down, no program imports another program, and files and functions are short enough to be read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "niels_gpt"

FLOORS: dict[int, tuple[str, ...]] = {  # the longest matching prefix decides
    0: (
        "paths",
        "files",
        "child",
        "command",
        "console",
        "contention",
        "rng",
        "device",
        "machine",
        "special_tokens",
        "unicode",
        "config",
        "native",
    ),
    1: ("settings", "data.types"),
    2: (
        "tokenizer",
        "spm_training",
        "batching",
        "epochs",
        "lr_schedule",
        "optim",
        "model",
        "data",
        "cache.format",
        "cache.folder",
        "cache.integrity",
    ),
    3: ("chat_format", "streams", "mixes", "cache", "checkpoint", "infer"),
    4: ("eval", "generate", "chat", "hub", "recall", "summary", "export"),
    5: ("train", "bench", "doctor", "plan"),  # and every program
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.stat().st_size > 200)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")


def is_program(path: Path) -> bool:
    source = path.read_text(encoding="utf-8")
    return "\ndef main(" in source or " argparse.ArgumentParser(" in source


PROGRAMS = {dotted(path) for path in MODULES if is_program(path)}


def floor(module: str) -> int:
    if module in PROGRAMS:
        return max(FLOORS)
    found = [(len(prefix), n) for n, names in FLOORS.items() for prefix in names if is_in(module, prefix)]
    assert found, f"niels_gpt.{module} has no floor; give it one in {Path(__file__).name} and docs/architecture.md"
    return max(found)[1]


def is_in(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                deeper = PACKAGE / "/".join(f"{node.module}.{alias.name}".split(".")[1:])
                is_module = node.module.startswith("niels_gpt") and (
                    deeper.with_suffix(".py").is_file() or (deeper / "__init__.py").is_file()
                )
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name.removeprefix("niels_gpt.") for name in names if name.startswith("niels_gpt.")}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_down(path: Path) -> None:
    here = dotted(path)
    for target in imports(path):
        assert floor(target) <= floor(here), f"{here} (floor {floor(here)}) imports {target} (floor {floor(target)})"
        if here.startswith("model"):
            assert not is_in(target, "infer") and not is_in(target, "generate")
        if target in PROGRAMS and here in PROGRAMS:
            raise AssertionError(f"program {here} imports program {target}")


def test_programs_are_known() -> None:
    assert {"cli", "quickstart", "train.run", "cache.cli", "hub.upload", "tokenizer.sample"} <= PROGRAMS
    assert not {"summary", "train.loop", "command", "export.hf", "cache.words"} & PROGRAMS


def test_the_walk_sees_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "low.py"
    upward.write_text("def f():\n    from niels_gpt.train import loop\n")
    assert imports(upward) == {"train.loop"} and floor("train.loop") > floor("files")


LONGEST_FILE, LONGEST_FUNCTION = 350, 50  # lines; of a test, only the file counts
CODE = ("niels_gpt", "train", "tools", "scripts")


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{path.name}:{node.lineno}: {node.name} has {lines} lines"


def test_functions_fit_a_screen() -> None:
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    assert [found for path in files for found in long_functions(path)] == []


def test_files_are_short() -> None:
    files = [path for folder in (*CODE, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_a_long_function_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text(
        "class C:\n    def fits(self):\n" + "        x = 1\n" * 49 + "    def long(self):\n" + "        x = 1\n" * 50
    )
    assert list(long_functions(path)) == ["long.py:52: long has 51 lines"]
