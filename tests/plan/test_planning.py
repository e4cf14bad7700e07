"""Plans from end to end on a machine that needs no measuring, as records and as the command prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.cli import main
from niels_gpt.console import wide_console
from niels_gpt.plan import cli, planning
from niels_gpt.plan.planning import Plan, make_plan, read_plan
from niels_gpt.plan.table import show
from niels_gpt.plan.text import Source
from niels_gpt.settings import DATA_SEEDS, validate_overrides
from tests.plan import samples


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is counted already: that of small talk takes seconds; `test_text.py` counts for real."""
    monkeypatch.setattr(planning, "read_text", lambda settings, say: _text(list(settings.data.mix_pretrain)))


def _text(names: list[str]) -> Any:
    known = {source.name: source for source in samples.TEXT.pretrain}
    sources = tuple(known.get(name, Source(name, 2_000_000, 50_000, 500)) for name in sorted(names))
    return replace(samples.TEXT, pretrain=sources)


def plan(hours: float, tmp_path: Path, **options: Any) -> Plan:
    return make_plan(hours, device="cpu", seed=42, folder=tmp_path, say=lambda text: None, run=samples.run, **options)


def test_the_settings_are_complete_and_valid(tmp_path: Path) -> None:
    made = plan(0.2, tmp_path)
    record = json.loads(json.dumps(made.record()))
    settings = validate_overrides(record["settings"])
    assert settings.model_dump(mode="json") == record["settings"] == made.settings.model_dump(mode="json")
    assert settings.training.sft_share == 0.6 and settings.training.sft.seed == 42
    chosen = record["chosen"]
    assert chosen == record["candidates"][0] and chosen["shape"]["width"] == settings.model.C
    assert chosen["prediction"]["low"] < chosen["prediction"]["bpb"] < chosen["prediction"]["high"]
    for key in ("tokens", "epochs", "steps", "micro_B", "base_lr", "peak_bytes", "disk_bytes"):
        assert chosen[key]
    assert {"tokenizer", "caches", "pretrain", "sft", "evaluation"} <= set(chosen["seconds"])
    assert {m["name"] for m in record["measured"]} >= {"128x3"}


def test_the_seed_reaches_every_split_and_shuffle(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "folder": tmp_path, "say": lambda text: None, "run": samples.run}
    for sources in (None, ["text", "chitchat"]):
        data = make_plan(0.2, seed=7, sources=sources, **options).settings.data.model_dump()
        assert {data[section][key] for section, key in DATA_SEEDS} == {7}


def test_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    drop = {"made_at", "probe_s", "machine"}
    first, second = (plan(0.2, tmp_path).record() for _ in range(2))
    assert {k: v for k, v in first.items() if k not in drop} == {k: v for k, v in second.items() if k not in drop}


def test_a_faked_device_of_4_gb(tmp_path: Path) -> None:
    small = plan(50, tmp_path, memory_bytes=4 * samples.GB)
    assert all(one.peak_bytes < 4 * samples.GB for one in small.candidates)
    large = plan(50, tmp_path, memory_bytes=400 * samples.GB)
    assert max(one.peak_bytes for one in large.candidates) > 4 * samples.GB


def test_other_text_has_its_own_caches_and_a_wide_band(tmp_path: Path) -> None:
    own, usual = plan(0.2, tmp_path, sources=["text", "chitchat"]), plan(0.2, tmp_path)
    data = own.settings.data
    assert set(data.mix_pretrain) == {"text", "chitchat", "primer"} and data.mix_pretrain["primer"] == 0.03
    assert data.mix_pretrain["chitchat"] == pytest.approx(0.97 * 10.7 / 12.7)
    assert data.val_pretrain_source == "text" and data.caches.pretrain_token_cache == "data/cache/plan/pretrain"
    assert not own.known_text and own.chosen.prediction.band > 2 * usual.chosen.prediction.band
    same = plan(0.2, tmp_path, sources=["primer", "chitchat"])
    assert same.settings.data == usual.settings.data
    with pytest.raises(ValueError, match="fineweb_edu is no source of text that can be read to the end"):
        plan(0.2, tmp_path, sources=["fineweb_edu"])
    with pytest.raises(ValueError, match="unknown source 'nowhere'"):
        plan(0.2, tmp_path, sources=["nowhere"])


@pytest.fixture
def _measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning.probe, "run_trial", samples.run)
    monkeypatch.setattr(planning.probe.measure, "__kwdefaults__", {"run": samples.run})
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_measured")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--hours", "0.1", "--device", "cpu", "--out", "plan.json"]) == 0
    shown = capsys.readouterr().out
    assert "candidates, best first" in shown and "niels-gpt train --plan plan.json" in shown
    record = read_plan(tmp_path / "plan.json")
    best = next(line for line in shown.splitlines() if line.startswith("│ *"))
    assert record["chosen"]["name"] in best and f"{record['chosen']['prediction']['bpb']:.3f}" in best
    assert shown.count("\n│") == 1 + record["settings"]["plan"]["shown"] - 1
    assert main(["plan", "--hours", "0.1", "--device", "cpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"] == record["settings"] and list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.parametrize("hours", [0.05, 100])
def test_no_figure_is_cut(hours: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(hours, tmp_path)
    show(wide_console(), made, len(made.candidates))
    shown = capsys.readouterr().out
    assert made.candidates[-1].shape.name in shown and "…" not in shown


@pytest.mark.parametrize("wrong", [["--hours", "0.049"], ["--hours", "101"], ["--hours", "nan"], ["--hours", "x"], []])
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(wrong)
    assert stopped.value.code == 2 and "--hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--memory-gb", "0"), ("--memory-gb", "inf"), ("--memory-gb", "nan"), ("--sources", "")]
)
def test_wrong_options(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--hours", "0.1", *wrong])
    assert stopped.value.code == 2 and f"error: {wrong[0]} must" in capsys.readouterr().err


@pytest.mark.usefixtures("_measured")
def test_what_cannot_be_planned_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--sources", "nowhere"], ["--memory-gb", "0.01"], ["--device", "tpu"]):
        assert main(["plan", "--hours", "0.1", "--out", "plan.json", *arguments]) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(SystemExit) as stopped:  # before a minute of measuring, not after
        main(["plan", "--hours", "0.1", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "is a folder; give a file" in capsys.readouterr().err


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError, match=r"no plan at .*niels-gpt plan --hours 1 --out"):
        read_plan(path)
    for content, said in (
        ("[]", "is no plan"),
        ('{"model": {}}', "is no plan"),
        ('{"format": "niels-gpt plan", "version": 9}', "version 9"),
        (
            '{"format": "niels-gpt plan", "version": 1, "hours": 1}',
            "seed: is missing; device: .*; settings: .*; chosen: is missing; plan again",
        ),
        (
            '{"format": "niels-gpt plan", "version": 1, "hours": 1, "seed": 1, "device": "cpu", "settings": {},'
            ' "chosen": {"name": "64x2", "seconds": {}}}',
            "chosen.seconds.pretrain: is missing; .*chosen.total_seconds: is missing; .*; plan again",
        ),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_plan(path)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("settings", [], r"settings: must be an object \(got a list\)"),
        ("seed", "x", r'seed: must be a whole number \(got "x"\)'),
        ("chosen.total_seconds", "x", r'chosen.total_seconds: must be a number \(got "x"\)'),
        ("chosen.seconds", {}, "chosen.seconds.pretrain: is missing; .*chosen.seconds.evaluation: is missing"),
        ("chosen.prediction", {}, "chosen.prediction.bpb: is missing"),
    ],
)
def test_what_carrying_out_a_plan_needs_is_checked_first(where: str, value: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole = json.loads(json.dumps(plan(0.5, tmp_path).record()))
    path.write_text(json.dumps(whole))
    assert read_plan(path) == whole
    *outer, last = where.split(".")
    inner = whole
    for key in outer:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"plan.json was changed: {said}.*; plan again"):
        read_plan(path)


def test_a_plan_has_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for other in (["--minutes", "5"], ["--phase", "sft"], ["--config", "configs/train.json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--plan", "plan.json", *other])
        assert stopped.value.code == 2 and f"leave out {other[0]}" in capsys.readouterr().err
