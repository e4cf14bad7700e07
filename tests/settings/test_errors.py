"""What is wrong with settings is one readable line each, whatever they are given; what resolves survives its record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from niels_gpt.settings import Settings, resolve_settings
from niels_gpt.settings.errors import leaf_paths
from tests.settings.problems import nested, problem


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("training.pretrain.base_ler", "training.pretrain.base_lr"),
        ("base_lr", "training.pretrain.base_lr"),
        ("modle", "model"),
        ("model.n_layers", "model."),
        ("data.mix_pretrian", "data.mix_pretrain"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(path: str, nearest: str) -> None:
    assert problem(nested(path, 1)).startswith(f"{path}: unknown key; the nearest known one is {nearest}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.pretrain.base_lr", -1, "must be greater than 0 (got -1)"),
        ("training.pretrain.base_lr", float("nan"), "must be a finite number (got nan)"),
        ("training.pretrain.base_lr", True, "must be a number (got true)"),
        ("training.sft.keep_last", 1, "must be at least 2 (got 1)"),
        ("training.sft.amp", 1, "must be one of True, False or 'auto' (got \"1\")"),
        ("training.sft.amp", "yes", "must be one of True, False or 'auto' (got \"yes\")"),
        ("training.sft.betas", [0.9], None),
        ("training.sft.betas", [0.9, 1.0], None),
        ("model.dropout", 1.0, "must be less than 1 (got 1.0)"),
        ("model.T", True, "must be a whole number (got true)"),
        ("model.T", 2.5, "must be a whole number (got 2.5)"),
        ("model.T", "64", 'must be a whole number (got "64")'),
        ("model.T", 0, "must be at least 1 (got 0)"),
        ("model.V", 10**400, "must be at most 65535 (got a huge number)"),
        ("model.rope_theta", float("inf"), None),
        ("model.norm_type", "batchnorm", "must be one of 'rmsnorm' or 'layernorm' (got \"batchnorm\")"),
        ("model", None, "must be an object (got null)"),
        ("model", [1], "must be an object (got a list)"),
        ("tokenizer.model_path", 3, "must be a text (got 3)"),
        ("tokenizer.model_path", "a\0b", None),
        ("tokenizer.model_path", "\ud800", None),
        ("tokenizer.tokenizer_sha256", "abc", None),
        ("generation.banned_token_ids", "3", 'must be a list (got "3")'),
        ("data.val_sft_source", "roam", None),
    ],
)
def test_a_value_out_of_bounds_is_one_line(path: str, value: Any, message: str | None) -> None:
    said = problem(nested(path, value))
    assert said.startswith(path) and "\n" not in said and "pydantic" not in said
    if message is not None:
        assert said == f"{path}: {message}"


def test_several_problems_are_several_lines_and_many_are_cut() -> None:
    said = problem({"model": {"T": 0, "L": "x"}, "generation": {"top_p": 2.0}})
    assert [line.partition(":")[0] for line in said.splitlines()] == ["model.T", "model.L", "generation.top_p"]
    assert len(problem({f"k{i}": 1 for i in range(5000)}).splitlines()) == 11


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text()
    | st.sampled_from([0, -1, 1e308, 10**4000, "\ud800", "\x00", "wiki", "auto", "weighted"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = ("tokenizer", "data", "data.mix_pretrain", "model", "training", "training.sft", "generation", "benchmark")
KNOWN = sorted([*leaf_paths(Settings), *SECTIONS, "train", "p_train", "cache_dir", "settings", "run_id", "_why"])


def merged(parts: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in parts:
        node = tree
        *above, name = path.split(".")
        for step in above:
            below = node.setdefault(step, {})
            node = below if isinstance(below, dict) else {}
        node[name] = value
    return tree


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KNOWN) | st.text(max_size=6), JSON), max_size=5).map(merged) | JSON)
def test_any_overrides_resolve_or_raise_a_readable_value_error(overrides: Any) -> None:
    try:
        resolve_settings("pretrain", overrides if isinstance(overrides, dict) else {"model": overrides})
    except ValueError as error:
        assert not isinstance(error, UnicodeError)
        for line in str(error).splitlines():
            assert line.isprintable() and len(line) < 400 and "pydantic" not in line


PLAUSIBLE = st.sampled_from(
    [0, 1, 2, 3, 8, 64, 256, 0.0, 0.5, 1.0, True, False, None, "auto", "byte", "muon", "a/b", [1, 2], [0.5, 0.9]]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(sorted(leaf_paths(Settings))), PLAUSIBLE), max_size=2).map(merged))
def test_what_resolves_survives_its_record(overrides: dict[str, Any]) -> None:
    try:
        resolved = resolve_settings("sft", overrides)
    except ValueError:
        return
    record = json.loads(json.dumps(resolved.record(), allow_nan=False))
    assert record["overrides"] == overrides
    assert resolve_settings("sft", record["settings"]).settings == resolved.settings


@pytest.mark.parametrize("value", [10**5000, -(10**5000), float("nan"), "\ud800\n", {"\n": {}}, [[]]], ids=range(6))
def test_no_knob_takes_nonsense(value: Any) -> None:
    for path in leaf_paths(Settings):
        lines = problem(nested(path, value)).splitlines()
        assert all(line.startswith(path) and line.isprintable() for line in lines), lines


def test_deep_nesting_is_refused_quickly(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(50_000):
        deep = {"model": deep}
    started = time.process_time()
    assert "model.model: unknown key" in problem(deep)
    for path in ("model.T", "generation.banned_token_ids", "data.mix_sft"):
        assert problem(nested(path, deep)).startswith(path)
    file = tmp_path / "deep.json"
    file.write_text('{"model":' * 100_000 + "1" + "}" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_settings("pretrain", file)
    assert time.process_time() - started < 30
    while isinstance(deep, dict):  # taken apart level by level: freeing it at once would recurse
        deep = deep.popitem()[1]
