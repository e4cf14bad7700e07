"""What is wrong with a configuration, in one line per problem: dotted key, rule, value found, nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MOST_PROBLEMS = 10  # lines in one error
MOST_SHOWN = 60  # characters of a value or key in a message

RULES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of {expected}",
    "too_short": "needs more items, at least {min_length}",
    "too_long": "has too many items, at most {max_length} fit",
    "string_too_short": "must not be empty",
    "string_too_long": "must be at most {max_length} characters",
    "string_unicode": "must be valid Unicode text",
    "missing": "is missing",
    "extra_forbidden": "is not a known key",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_pattern_mismatch": "must match {pattern}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}


def one_error(problems: Iterable[str]) -> ValueError:
    """One exception for several problems, a line each."""
    lines = list(problems)
    rest = len(lines) - MOST_PROBLEMS
    return ValueError("\n".join(lines[:MOST_PROBLEMS] + ([f"and {rest} more problems"] if rest > 0 else [])))


def shown(value: Any) -> str:
    """A value for a message: short, on one line, never expanding a container."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge number"
    if isinstance(value, (int, float)):
        return repr(value)
    text = shown_key(value) if isinstance(value, str) else type(value).__name__
    return f'"{text}"' if isinstance(value, str) else text


def shown_key(key: Any) -> str:
    """A key, or a text, cut short and with control characters escaped."""
    if not isinstance(key, str):
        return shown(key)
    short = key if len(key) <= MOST_SHOWN else key[:MOST_SHOWN] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]


def reworded(error: ValidationError) -> list[str]:
    """pydantic's problems as sentences such as `training.pretrain.base_lr: must be greater than 0 (got -1)`."""
    details = error.errors(include_url=False)
    # A list with a bad item is reported once more as too short, without that item.
    inside = {detail["loc"][:-1] for detail in details}
    return [_sentence(d) for d in details if not (d["type"] == "too_short" and d["loc"] in inside)]


def _sentence(detail: ErrorDetails) -> str:
    parts = [str(part) if isinstance(part, int) else shown_key(part) for part in detail["loc"] if part != "[key]"]
    key = ".".join(parts)
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        said = str(context["error"])
        return said if not key or said.startswith(key) else f"{key}: {said}"
    rule = RULES.get(detail["type"])
    plain = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    said = rule.format(**plain) if rule else detail["msg"].splitlines()[0]
    return f"{key or 'overrides'}: {said}" + ("" if detail["type"] == "missing" else f" (got {shown(detail['input'])})")


def key_problems(tree: type[BaseModel], overrides: Mapping[Any, Any]) -> list[str]:
    """One line for every unknown key of `overrides`; those that will be shown name the nearest known one."""
    known = list(leaf_paths(tree))
    unknown = list(_unknown_keys(tree, overrides, ""))
    lines = [_unknown(path, level, known) for path, level in unknown[:MOST_PROBLEMS]]
    return lines + [f"{path}: unknown key" for path, _ in unknown[MOST_PROBLEMS:]]


def leaf_paths(tree: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every knob."""
    for name, field in tree.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from leaf_paths(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def _unknown_keys(tree: type[BaseModel], given: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, list[str]]]:
    """(dotted unknown key, dotted known keys of its level)"""
    for key, value in given.items():
        field = tree.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            yield prefix + shown_key(key), [prefix + name for name in tree.model_fields]
        elif isinstance(value, Mapping):
            nested = field.annotation
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                yield from _unknown_keys(nested, value, f"{prefix}{key}.")


def _unknown(path: str, level: list[str], known: list[str]) -> str:
    """Names the nearest key: a close one of the same level, else a close one anywhere, else the level's closest."""
    name = path.rpartition(".")[2].lower()
    for candidates, cutoff in ((level, 0.6), (known, 0.7), (level, 0.0)):
        by_name = {candidate.rpartition(".")[2].lower(): candidate for candidate in reversed(candidates)}
        near = difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
        if near:
            return f"{path}: unknown key; the nearest known one is {by_name[near[0]]}"
    return f"{path}: unknown key; {level[0]} would be one"
