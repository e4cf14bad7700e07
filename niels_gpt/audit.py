"""The guardrail of the settings: no hyperparameter or sentinel outside its home, and no knob that nothing reads.

    python tools/audit_config_coverage.py

Reads Python files with `ast`, runs none of them. It goes by names: a value passed under another name escapes it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from niels_gpt import paths
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import SPECIAL_TOKENS

FOLDERS = ("niels_gpt", "train", "tools", "scripts")
NUMBERS_HOME = "niels_gpt/settings/"
SENTINELS_HOME = "niels_gpt/special_tokens.py"
SETTINGS_HELPERS = frozenset(f"{NUMBERS_HOME}{name}.py" for name in ("doc", "errors", "legacy"))
# fmt: off
HYPERPARAMETERS = frozenset({
    "base_lr", "min_lr", "warmup_steps", "weight_decay", "betas", "eps", "grad_clip", "total_steps",
    "eval_every", "eval_steps", "ckpt_every", "micro_B", "accum_steps", "dropout", "rope_theta", "vocab_size",
    "T", "C", "L", "H", "d_ff", "temperature", "top_k", "top_p", "max_new_tokens",
})
# fmt: on
OPTIMIZER_KEYWORDS = frozenset({"lr", "betas", "eps", "weight_decay"})
SENTINEL_PREFIX = SPECIAL_TOKENS["sys"].partition("sys")[0]
COMMON_NAMES = frozenset({"type", "name", "path", "config", "split", "shuffle", "optimizer"})
# Knobs and sections whose readers are still to be written. A name goes from here when all of it is read.
AWAITED: tuple[str, ...] = ()
# Records that carry a section's values under the same field names.
OTHER_NAMES = {"training": ("train_cfg", "TrainConfig"), "model": ("model_cfg", "ModelConfig", "arch", "Architecture")}


class Finding(NamedTuple):
    """A place and what is wrong there."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def hardcoded(file: str, tree: ast.Module) -> list[Finding]:
    """Hyperparameters and sentinels written into one file (named relative to the project)."""
    found: list[Finding] = []
    for node in ast.walk(tree):
        if not file.startswith(NUMBERS_HOME):
            found += [
                Finding(file, value.lineno, f"{name} is hardcoded as {ast.unparse(value)}; read it from settings")
                for name, value in _named_values(node)
                if _is_number(value)
            ]
        if file != SENTINELS_HOME and isinstance(node, ast.Constant) and _has_sentinel(node.value):
            found.append(Finding(file, node.lineno, "a sentinel literal; import it from niels_gpt.special_tokens"))
    return sorted(set(found))


def _named_values(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(hyperparameter name, value) of assignments, argument defaults, optimizer keywords and command-line defaults."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _assigned(target, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        yield from _assigned(node.target, node.value)
    elif isinstance(node, ast.arguments):
        positional = node.posonlyargs + node.args
        defaults = [*zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)]
        defaults += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
        yield from ((a.arg, default) for a, default in defaults if a.arg in HYPERPARAMETERS)
    elif isinstance(node, ast.Call):
        called = _last_name(node.func)
        if "Adam" in called or called == "Muon":
            yield from ((k.arg, k.value) for k in node.keywords if k.arg in OPTIMIZER_KEYWORDS)
        elif called == "add_argument":
            options = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            named = [o for o in options if o.lstrip("-").replace("-", "_") in HYPERPARAMETERS]
            yield from ((named[0], k.value) for k in node.keywords if named and k.arg == "default")


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
        for one, part in zip(target.elts, value.elts, strict=False):
            yield from _assigned(one, part)
    elif (name := _last_name(target)) in HYPERPARAMETERS:
        yield name, value


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_number(node: ast.expr) -> bool:
    """A number, or arithmetic or a sequence of nothing but numbers."""
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    return isinstance(node, (ast.Tuple, ast.List)) and bool(node.elts) and all(map(_is_number, node.elts))


def _has_sentinel(value: object) -> bool:
    if isinstance(value, bytes):
        return SENTINEL_PREFIX.encode() in value
    return isinstance(value, str) and SENTINEL_PREFIX in value


class Knob(NamedTuple):
    """A leaf of the settings tree."""

    path: str  # training.pretrain.base_lr
    owner: str  # the class that declares it

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.path.split(".")[-2]

    def within(self, name: str) -> bool:
        """True for the knob, or a section around it, of this dotted name."""
        return f"{self.path}.".startswith(f"{name}.")


def knobs(tree: type[BaseModel] = Settings, prefix: str = "") -> Iterator[Knob]:
    """Every leaf of the tree, depth first."""
    for name, field in tree.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from knobs(nested, f"{prefix}{name}.")
        else:
            owner = next(cls for cls in reversed(tree.__mro__) if name in inspect.get_annotations(cls))
            yield Knob(prefix + name, owner.__name__)


def unread(trees: Mapping[str, ast.Module], wanted: Iterable[Knob]) -> list[Knob]:
    """Knobs that no file reads as `.name` or `["name"]`.

    Where the name says too little (several sections have it, or Python code in general), the file that reads it must
    mention the knob's section as well.
    `.section.model_dump` reads the whole section. In the package `settings` the sections do not count (a validator is
    no reader), and its helpers not at all.
    """
    read: dict[str, set[str]] = {}  # name read -> every name mentioned in files that read it
    for file, tree in trees.items():
        if file in SETTINGS_HELPERS:
            continue
        is_tree = file.startswith(NUMBERS_HOME)
        nodes: list[ast.AST] = [n for n in tree.body if not (is_tree and isinstance(n, ast.ClassDef) and n.bases)]
        everything = [inner for node in nodes for inner in ast.walk(node)]
        mentioned = set(_mentions(everything))
        for name in _reads(everything):
            read.setdefault(name, set()).update(mentioned)
    vague = _vague_names()
    return [
        knob
        for knob in wanted
        if f"{knob.section}.*" not in read
        and (knob.name not in read or (knob.name in vague and not _sections(knob) & read[knob.name]))
    ]


def _vague_names() -> set[str]:
    sections: dict[str, set[frozenset[str]]] = {}
    for knob in knobs():
        sections.setdefault(knob.name, set()).add(frozenset(_sections(knob)))
    return {name for name, found in sections.items() if len(found) > 1} | COMMON_NAMES


def _reads(nodes: Sequence[ast.AST]) -> Iterator[str]:
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
            yield node.attr
        elif isinstance(node, ast.Attribute) and node.attr == "model_dump":
            yield f"{_last_name(node.value)}.*"
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.ctx, ast.Load)
        ):
            yield str(node.slice.value)


def _mentions(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.split(".")[:4] if len(node.value) < 100 else ()


def _sections(knob: Knob) -> set[str]:
    """Names under which a reader may hold the knob's section."""
    top = knob.path.partition(".")[0]
    own = {"training", "pretrain", "sft"} if top == "training" else {knob.section, f"{knob.section}_settings"}
    return own.union({knob.owner}, OTHER_NAMES.get(top, ()))


def _once(missing: Iterable[Knob]) -> list[Knob]:
    """One of the knobs that both phases share."""
    return list({(knob.name, frozenset(_sections(knob))): knob for knob in reversed(list(missing))}.values())[::-1]


def python_files(root: Path) -> dict[str, Path]:
    """Name relative to `root` -> path, of every Python file in the scanned folders."""
    found = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))
    return {path.relative_to(root).as_posix(): path for path in found}


def declared(trees: Mapping[str, ast.Module]) -> dict[tuple[str, str], tuple[str, int]]:
    """(class, field) -> file and line, of every knob in the package `settings`."""
    return {
        (node.name, field.target.id): (file, field.lineno)
        for file, tree in trees.items()
        if file.startswith(NUMBERS_HOME)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def audit(root: Path) -> tuple[list[Finding], int]:
    """Everything wrong under `root`, and how many files were read; unread knobs only where settings are there."""
    trees: dict[str, ast.Module] = {}
    found: list[Finding] = []
    for file, path in python_files(root).items():
        try:
            trees[file] = ast.parse(path.read_bytes(), filename=file)
        except (SyntaxError, ValueError) as error:
            found.append(Finding(file, getattr(error, "lineno", None) or 1, f"is not valid Python: {error}"))
        else:
            found += hardcoded(file, trees[file])
    if places := declared(trees):
        found += [
            Finding(*places[knob.owner, knob.name], f"{knob.path} is read nowhere; use or remove it")
            for knob in _once(unread(trees, knobs()))
            if (knob.owner, knob.name) in places and not any(knob.within(name) for name in AWAITED)
        ]
        found += [
            Finding("niels_gpt/audit.py", 1, f"AWAITED names {name}, but all of it is read; remove it there")
            for name in AWAITED
            if not unread(trees, (knob for knob in knobs() if knob.within(name)))
        ]
    return found, len(trees)


def main(argv: list[str] | None = None) -> int:
    """Print every finding and return 1, or `OK N files scanned` and return 0."""
    parser = argparse.ArgumentParser(description="Check that every knob lives in settings, and that each is read.")
    parser.add_argument("--root", type=Path, default=paths.PROJECT_ROOT, help="project folder (default: this one)")
    args = parser.parse_args(argv)
    if not any((args.root / folder).is_dir() for folder in FOLDERS):
        print(f"error: {args.root} has none of the folders {', '.join(FOLDERS)}", file=sys.stderr)
        return 2
    found, scanned = audit(args.root)
    for finding in found:
        print(finding)
    if found:
        return 1
    print(f"OK {scanned} files scanned")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
