"""Imports point down: no module imports one of a higher floor, and no program imports another program."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "niels_gpt"

FLOORS: dict[int, tuple[str, ...]] = {  # the longest matching prefix decides
    0: ("paths", "files", "command", "rng", "device", "machine", "special_tokens", "config", "native"),
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
