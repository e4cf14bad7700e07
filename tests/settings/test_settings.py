"""Settings: defaults, merging, what must agree, the tokenizer's file and ids, and the record."""

from __future__ import annotations

import json
import os
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from niels_gpt import files, paths
from niels_gpt.config import NEW, V1
from niels_gpt.settings import (
    PRETRAIN_SOURCES,
    SFT_SOURCES,
    Settings,
    default_settings,
    load_overrides,
    resolve_settings,
    tokenizer_file,
)
from tests.reference import BUNDLE, needs_bundle
from tests.settings.problems import problem

# defaults


def test_every_knob_has_a_line_of_help() -> None:
    def check(section: type[Any]) -> None:
        for name, field in section.model_fields.items():
            assert field.description and "\n" not in field.description, (section, name)
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(Settings)


def test_a_resolved_run_cannot_be_changed() -> None:
    resolved = resolve_settings("pretrain")
    with pytest.raises(FrozenInstanceError):
        resolved.run_id = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        resolved.settings.model.L = 2  # type: ignore[misc]


def test_defaults_cannot_be_poisoned_through_a_resolved_run() -> None:
    resolve_settings("pretrain").settings.data.mix_pretrain["wikitext"] = 9.0
    for overrides in ({}, {"tokenizer": {"special_tokens": default_settings().tokenizer.special_tokens}}):
        resolve_settings("pretrain", overrides).settings.tokenizer.special_tokens["sys"] = "x"
    assert default_settings().data.mix_pretrain["wikitext"] == 0.2
    assert default_settings().tokenizer.special_tokens["sys"] != "x"


# overrides


def test_objects_merge_and_mixes_replace() -> None:
    resolved = resolve_settings(
        "pretrain", {"model": {"L": 2}, "data": {"mix_pretrain": {"wikitext": 0.6, "roam": 0.4}}}
    )
    assert (resolved.model_cfg.L, resolved.model_cfg.C) == (2, 384)
    assert resolved.settings.data.mix_pretrain == {"wikitext": 0.6, "roam": 0.4}
    assert resolved.settings.data.mix_sft == default_settings().data.mix_sft


def test_overrides_come_from_a_dict_or_a_file_by_either_name(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"_why": "a reason", "model": {"L": 3}}', encoding="utf-8")
    for resolved in (
        resolve_settings("sft", path),
        resolve_settings(phase="sft", overrides_path=str(path)),
        resolve_settings("sft", overrides={"model": {"L": 3}}),
    ):
        assert resolved.model_cfg.L == 3
        assert resolved.overrides == {"model": {"L": 3}}
    assert resolve_settings("sft", path).overrides_source == str(path)
    assert resolve_settings("sft", {}).overrides_source is None
    assert load_overrides(None) == {}
    with pytest.raises(ValueError, match="not both"):
        resolve_settings("sft", {}, overrides_path=path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"model": ', '{"model": {}, "model": {}}', "\ufeff\xff"])
def test_a_file_that_is_no_json_object_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape("broken.json")):
        resolve_settings("pretrain", path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*nowhere\.json"):
        resolve_settings("pretrain", tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="dict or the path"):
        load_overrides(3)  # type: ignore[arg-type]


def test_the_phase_is_checked() -> None:
    with pytest.raises(ValueError, match="phase must be one of pretrain, sft"):
        resolve_settings("pipeline")


def test_the_overrides_are_not_changed_and_not_shared() -> None:
    given_ = {"_why": "x", "data": {"mix_pretrain": {"wikitext": 1.0}}, "tokenizer": {"normalization": "nfkc"}}
    before = json.dumps(given_)
    resolved = resolve_settings("pretrain", given_)
    resolved.overrides["data"]["mix_pretrain"]["wikitext"] = 5
    assert json.dumps(given_) == before


# what must agree


@pytest.mark.parametrize(
    ("model", "message"),
    [({"C": 65, "H": 4}, "not divisible"), ({"C": 36, "H": 4}, "must be even")],
)
def test_the_shape_must_be_possible(model: dict[str, int], message: str) -> None:
    assert message in problem({"model": model})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"wikitext": 0.5, "roam": 0.4}, "sum to 0.9 in {'wikitext': 0.5, 'roam': 0.4}"),
        ({"wikitext": 1.0, "roam": 0.0}, "the weight of roam must be in (0, 1], got 0"),
        ({"wikitext": 1.5, "roam": -0.5}, "the weight of wikitext must be in (0, 1], got 1.5"),
        ({"wikipedia": 1.0}, "unknown source 'wikipedia'; sources are wikitext, "),
        ({}, "sum to 0"),
    ],
)
def test_mixes_are_checked(mix: dict[str, float], message: str) -> None:
    said = problem({"data": {"mix_pretrain": mix}})
    assert said.startswith("data.mix_pretrain: ") and message in said


def test_a_mix_may_be_off_by_rounding() -> None:
    thirds = {"wikitext": 0.3333333, "roam": 0.3333333, "text": 0.3333333}
    assert resolve_settings("pretrain", {"data": {"mix_pretrain": thirds}}).settings.data.mix_pretrain == thirds


def test_all_sources_are_allowed() -> None:
    for name, sources in (("mix_pretrain", PRETRAIN_SOURCES), ("mix_sft", SFT_SOURCES)):
        mix = dict.fromkeys(sources, 1 / len(sources))
        assert getattr(resolve_settings("sft", {"data": {name: mix}}).settings.data, name) == mix


@pytest.mark.parametrize(
    ("phase", "knobs", "message"),
    [
        ("pretrain", {"total_steps": 10}, "warmup_steps=340 is more than total_steps=10"),
        ("pretrain", {"base_lr": 1e-5}, "min_lr=3e-05 is above base_lr=1e-05"),
        ("sft", {"best_metric": "weighted"}, "need each other"),
        ("sft", {"best_metric_weights": {"sft_val_loss": 1.0}}, "need each other"),
        ("sft", {"best_metric": "weighted", "best_metric_weights": {}}, "need each other"),
        ("pretrain", {"best_metric": "sft_val_loss"}, "pretraining measures no sft_val_loss"),
    ],
)
def test_knobs_of_a_phase_must_agree(phase: str, knobs: dict[str, Any], message: str) -> None:
    said = problem({"training": {phase: knobs}})
    assert said.startswith(f"training.{phase}: ") and message in said


def test_a_weighted_metric_resolves() -> None:
    weights = {"sft_val_loss": 1.0, "pretrain_val_loss": 0.5}
    knobs = {"best_metric": "weighted", "best_metric_weights": weights}
    train_cfg = resolve_settings("sft", {"training": {"sft": knobs}}).train_cfg
    assert (train_cfg.best_metric, train_cfg.best_metric_weights) == ("weighted", weights)


# tokenizer and ids


def test_special_tokens_cannot_be_overridden() -> None:
    assert "cannot be overridden" in problem({"tokenizer": {"special_tokens": {"sys": "<s>"}}})
    same = default_settings().tokenizer.special_tokens
    assert resolve_settings("sft", {"tokenizer": {"special_tokens": same}}).settings.tokenizer.special_tokens == same


def test_special_ids_must_fit_and_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert "eot=6 does not fit model.V=6" in problem({"model": {"V": 6}})
    assert resolve_settings("pretrain", {"model": {"V": 7}}).special_token_ids["eot"] == 6
    assert "tokenizer.vocab_size=16000 is more than model.V=7" in capsys.readouterr().err
    assert "must differ" in problem({"tokenizer": {"expected_special_token_ids": {"sys": 4}}})
    assert "generation.stop_token_id=16000" in problem({"generation": {"stop_token_id": 16000}})
    assert "generation.banned_token_ids.1=16000" in problem({"generation": {"banned_token_ids": [1, 16000]}})


def test_stop_and_banned_ids() -> None:
    resolved = resolve_settings("sft")
    assert (resolved.stop_token_id, resolved.banned_token_ids) == (6, (3, 4, 5))
    resolved = resolve_settings("sft", {"generation": {"stop_token_id": 0, "banned_token_ids": []}})
    assert (resolved.stop_token_id, resolved.banned_token_ids) == (0, ())
    resolved = resolve_settings("sft", {"sft_format": {"ban_role_tokens_during_generation": False}})
    assert resolved.banned_token_ids == ()


def test_byte_models_have_no_special_ids() -> None:
    v1 = {"V": 256, "norm_type": "layernorm", "mlp_type": "gelu", "mlp_bias": True, "qk_norm": False}
    resolved = resolve_settings("pretrain", {"tokenizer": {"type": "byte"}, "model": v1})
    assert (resolved.special_token_ids, resolved.stop_token_id, resolved.banned_token_ids) == ({}, None, ())
    assert (resolved.arch, resolved.tokenizer_sha256, resolved.tokenizer_meta) == (V1, None, {})
    assert resolve_settings("pretrain").arch == NEW
    assert "model.V=16000 must be 256" in problem({"tokenizer": {"type": "byte"}})


def test_the_tokenizer_file_is_hashed_and_a_mismatch_names_both_hashes(tmp_path: Path) -> None:
    model = tmp_path / "spm.model"
    model.write_bytes(b"not a model, but hashed all the same")
    found, other = files.sha256_file(model), "0" * 64
    assert resolve_settings("sft", {"tokenizer": {"model_path": model}}).tokenizer_sha256 == found
    said = problem({"tokenizer": {"model_path": str(model), "tokenizer_sha256": other}})
    assert "tokenizer hash mismatch" in said and found in said and other in said
    absent = {"tokenizer": {"model_path": str(tmp_path / "absent"), "tokenizer_sha256": other}}
    assert resolve_settings("sft", absent).tokenizer_sha256 == other


def test_the_tokenizer_file_is_looked_for_here_first_then_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    tokenizer = resolve_settings("sft", {"tokenizer": {"model_path": "a/spm.model"}}).settings.tokenizer
    assert tokenizer_file(tokenizer) is None
    files.write_text(tmp_path / "project" / "a" / "spm.model", "shipped")
    assert tokenizer_file(tokenizer) == tmp_path / "project" / "a" / "spm.model"
    files.write_text(tmp_path / "a" / "spm.model", "own")
    assert tokenizer_file(tokenizer) == Path("a/spm.model")


# the record


def test_the_record_is_written_where_runs_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "RUNS_DIR", tmp_path / "runs")
    resolved = resolve_settings("pretrain", {"model": {"L": 2}}, write_resolved=True)
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", resolved.run_id)
    assert resolved.resolved_path == tmp_path / "runs" / resolved.run_id / "resolved_settings.json"
    assert files.read_json(resolved.resolved_path) == resolved.record()
    assert list(files.read_json(resolved.resolved_path)) == [  # published ones lack arch
        *("arch", "banned_token_ids", "generated_at_utc", "model_cfg", "overrides", "overrides_source", "phase"),
        *("run_id", "settings", "special_token_ids", "stop_token_id", "tokenizer", "train_cfg"),
    ]
    assert resolve_settings("pretrain", resolved.resolved_path).settings == resolved.settings


def test_a_file_may_have_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has such names with halves of surrogate pairs, which the record could not hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS_DIR", tmp_path)
    name = Path(os.fsdecode(b"c\xe9.json"))
    try:
        name.write_text("{}")
    except OSError:
        pytest.skip("this file system refuses it")
    written = resolve_settings("sft", name, write_resolved=True).resolved_path
    assert written is not None and files.read_json(written)["overrides_source"] == "c\ufffd.json"


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "RUNS_DIR", tmp_path / "runs")
    assert resolve_settings("pretrain").resolved_path is None
    assert not (tmp_path / "runs").exists()


def test_a_run_id_cannot_leave_the_runs_folder() -> None:
    for run_id in ("../x", "a/b", ".hidden", "a\n", "x" * 200):
        with pytest.raises(ValueError, match="run_id"):
            resolve_settings("pretrain", run_id=run_id)


@needs_bundle
@pytest.mark.parametrize("phase", ["pretrain", "sft"])
def test_the_record_has_the_published_layout(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = BUNDLE / "v2" / "train_run"
    published = files.read_json(folder / phase / "latest.pt.resolved_settings.json")
    overrides = files.read_json(folder / "overrides.json")
    overrides["tokenizer"]["model_path"] = str(BUNDLE / "v2" / "tokenizer" / "spm.model")
    ours = resolve_settings(phase, overrides).record()
    assert set(ours) - set(published) == {"arch"} and not set(published) - set(ours)
    for key in ("model_cfg", "train_cfg", "special_token_ids", "stop_token_id", "banned_token_ids", "phase"):
        assert ours[key] == published[key]
    for key in ("sha256", "special_tokens", "meta"):
        assert ours["tokenizer"][key] == published["tokenizer"][key]
    for phase_ in ("pretrain", "sft"):
        common = published["settings"]["training"][phase_]
        assert {k: ours["settings"]["training"][phase_][k] for k in common} == common
