"""Old config layouts resolve, and say what was changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from niels_gpt import files
from niels_gpt.config import V1, V2
from niels_gpt.settings import Settings, resolve_settings
from niels_gpt.settings.errors import leaf_paths
from niels_gpt.settings.legacy import RENAMED, WITHOUT_EFFECT, translate
from tests.reference import BUNDLE, needs_bundle

BYTE_MODEL = {"V": 256, "T": 128, "C": 64, "L": 2, "H": 4, "d_ff": 128, "dropout": 0.1, "rope_theta": 10000.0}
TRAIN = {
    "seed": 1, "B": 8, "total_steps_smoke": 5, "total_steps": 100, "eval_every": 50, "eval_steps": 3, "log_every": 10,
    "ckpt_every": 20, "base_lr": 3e-4, "warmup_steps": 4, "min_lr": 3e-5, "grad_clip": 0.5, "accum_steps": 2,
    "p_train": {"wiki": 0.72, "roam": 0.18, "primer": 0.1},
}  # fmt: skip


def test_the_byte_models_layout_becomes_a_byte_run(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = resolve_settings("pretrain", {"model": BYTE_MODEL, "train": TRAIN})
    assert resolved.arch == V1 and resolved.settings.tokenizer.type == "byte"
    assert (resolved.model_cfg.V, resolved.model_cfg.C) == (256, 64)
    cfg = resolved.train_cfg
    assert (cfg.seed, cfg.B, cfg.total_steps, cfg.grad_clip, cfg.accum_steps) == (1, 8, 100, 0.5, 2)
    assert resolved.settings.data.mix_pretrain == {"wikitext": 0.72, "roam": 0.18, "primer": 0.1}
    err = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in err) and len(err) == 2
    assert "old config layout" in err[0] and "p_train is now data.mix_pretrain" in err[1]


def test_the_old_layout_serves_either_phase(capsys: pytest.CaptureFixture[str]) -> None:
    train = {"B": 2, "total_steps": 9, "warmup_steps": 0, "beta1": 0.8, "beta2": 0.9, "p_train": {"dolly": 1.0}}
    for phase in ("pretrain", "sft"):
        resolved = resolve_settings(phase, {"model": {"T": 64}, "train": train})
        cfg = resolved.train_cfg
        assert (cfg.B, cfg.total_steps, cfg.beta1, cfg.beta2, resolved.model_cfg.V) == (2, 9, 0.8, 0.9, 16000)
        assert resolved.settings.data.mix_sft == {"dolly15k": 1.0}


def test_what_is_said_in_the_new_layout_wins() -> None:
    given = {"train": {"B": 2}, "training": {"sft": {"micro_B": 3}}}
    overrides, _ = translate(given)
    assert overrides["training"] == {"pretrain": {"micro_B": 2}, "sft": {"micro_B": 3}}


def test_unknown_keys_of_the_old_layout_are_still_errors() -> None:
    with pytest.raises(ValueError, match=r"training\.pretrain\.learning_rate: unknown key"):
        resolve_settings("pretrain", {"train": {"learning_rate": 1.0}})


@pytest.mark.parametrize(
    ("given", "caches"),
    [
        ({"cache_dir": "x/streams"}, {"streams_token_cache": "x/streams"}),
        ({"cache_dir": "x/sft/", "streams_cache_dir": "y"}, {"sft_token_cache": "x/sft/", "streams_token_cache": "y"}),
        ({"cache_dir": "x/pretrain"}, {"pretrain_token_cache": "x/pretrain"}),
        (
            {"cache_dir": "x"},
            {"pretrain_token_cache": "x/pretrain", "sft_token_cache": "x/sft", "streams_token_cache": "x/streams"},
        ),
    ],
)
def test_old_cache_folders(given: dict[str, str], caches: dict[str, str]) -> None:
    overrides, warnings = translate(given)
    assert overrides == {"data": {"caches": caches}}
    assert len(warnings) == len(given)
    assert Settings.model_validate(overrides).data.caches.model_dump().items() >= caches.items()


def test_settings_without_effect_are_dropped_in_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {
        "data": {"chunking": {"stride": 1}, "roam": {"chunking": None, "val_frac": 0.2}},
        "benchmark": {"lr": 3e-4},
        "sft_format": {"require_eot": True},
    }
    resolved = resolve_settings("pretrain", overrides)
    assert resolved.settings.data.roam.val_frac == 0.2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for name in ("data.chunking", "data.roam.chunking", "benchmark.lr", "sft_format.require_eot"):
        assert name in err


def test_nothing_that_is_a_knob_is_dropped_or_renamed() -> None:
    assert not {*WITHOUT_EFFECT, *RENAMED} & set(leaf_paths(Settings))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokenizer": {"tokenizer_type": "unigram"}}, {"tokenizer": {"type": "unigram"}}),
        ({"data": {"wikitext": {"val_split": "val"}}}, {"data": {"wikitext": {"val_split": "validation"}}}),
        ({"data": {"mix_pretrain": {"wiki": 1.0}}}, {"data": {"mix_pretrain": {"wikitext": 1.0}}}),
        ({"data": {"mix_sft": {"dolly": 1.0}}}, {"data": {"mix_sft": {"dolly15k": 1.0}}}),
        ({"p_train": None}, {}),
        ({"allow_missing_idx": True}, {"data": {"allow_missing_idx": True}}),
    ],
)
def test_renamed(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate(given)[0] == expected


def test_todays_layout_passes_untouched_and_silently() -> None:
    given = {"model": {"L": 2}, "data": {"mix_pretrain": {"wikitext": 1.0}}, "training": {"sft": {"seed": 3}}}
    assert translate(given) == (given, [])


def test_the_callers_dict_is_left_alone() -> None:
    given = {"model": BYTE_MODEL, "train": TRAIN, "data": {"chunking": {}, "caches": {"raw_cache_dir": "x"}}}
    before = json.dumps(given)
    translate(given)
    assert json.dumps(given) == before


@pytest.mark.parametrize("odd", [3, None, [], "x", {"a": {}}])
@pytest.mark.parametrize("key", ["train", "p_train", "cache_dir", "settings", "data", "model", "tokenizer"])
def test_odd_shapes_are_no_crash(key: str, odd: Any) -> None:
    for given in ({key: odd}, {"run_id": "r", key: odd}, {"train": {"p_train": odd}, key: odd}):
        try:
            resolve_settings("pretrain", given)
        except ValueError as error:
            assert "unknown" in str(error) or ":" in str(error)


@needs_bundle
@pytest.mark.parametrize("phase", ["pretrain", "sft"])
def test_a_published_record_of_a_run_resolves_to_that_run(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = files.read_json(BUNDLE / "v2" / "train_run" / phase / "latest.pt.resolved_settings.json")
    record["settings"]["tokenizer"]["model_path"] = str(BUNDLE / "v2" / "tokenizer" / "spm.model")
    resolved = resolve_settings(phase, record)
    assert resolved.arch == V2
    assert resolved.record()["train_cfg"] == record["train_cfg"]
    assert resolved.tokenizer_sha256 == record["tokenizer"]["sha256"]
    assert "record of a run" in capsys.readouterr().err


@needs_bundle
def test_the_published_overrides_resolve_without_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    resolve_settings("pretrain", BUNDLE / "v2" / "train_run" / "overrides.json")
    assert capsys.readouterr().err == ""
