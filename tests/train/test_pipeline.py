"""Both phases in a row: one time budget for them, and going on where a stop came."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import checkpoint as ckpt
from niels_gpt.checkpoint.loaded import recorded_settings
from niels_gpt.checkpoint.sources import learned_from
from niels_gpt.command import Interrupted
from niels_gpt.train import pipeline as pipeline_module
from niels_gpt.train.lineage import pretrained_model
from niels_gpt.train.loop import Loop
from niels_gpt.train.pipeline import budget_shares, pipeline_configs, run_pipeline
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.run import main
from niels_gpt.train.saving import Origin
from niels_gpt.train.sft import run_sft
from niels_gpt.train.start import TimeLimit
from tests.train import workshop


@pytest.fixture
def pipeline(world: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "both.json").write_text(json.dumps(world))
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"pretrain_config_path": "both.json", "sft_config_path": "both.json"}))
    return path


def record(phase: str) -> dict[str, Any]:
    return ckpt.load_checkpoint(ckpt.phase_paths(phase).latest, device="cpu")["resume"] or {}


def stop_in_sft(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """As a signal would, after a step of fine-tuning."""
    one_step = Loop._one_step

    def stopping(loop: Loop) -> None:
        one_step(loop)
        if loop.job.phase == "sft" and loop.state.step == at:
            loop.stop.signum = 15

    monkeypatch.setattr(Loop, "_one_step", stopping)


def test_a_pipeline_stopped_while_fine_tuning_goes_on_fine_tuning(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sha = workshop.weights_sha(run_pipeline(pipeline, device="cpu")["sft"]["latest_path"])
    pretrained = ckpt.phase_paths("pretrain").latest.stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_in_sft(patch, 7)
        run_pipeline(pipeline, device="cpu")  # finished, so fine-tuning is done afresh
    assert record("sft")["evaluated_step"] == 5
    capsys.readouterr()
    done = run_pipeline(pipeline, device="cpu")
    assert list(done) == ["sft"] and workshop.weights_sha(done["sft"]["latest_path"]) == sha
    assert ckpt.phase_paths("pretrain").latest.stat().st_mtime_ns == pretrained
    assert "resumed from checkpoints/sft/latest.pt" in capsys.readouterr().out


def test_other_weights_of_pretraining_make_fine_tuning_start_afresh(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_in_sft(patch, 7)
        run_pipeline(pipeline, device="cpu")
    run_pipeline(pipeline, device="cpu", no_auto_resume=True)
    out = capsys.readouterr().out
    assert "resumed from" not in out and out.count("sft init from checkpoints/pretrain/best.pt") == 2


def missing_file(config: dict[str, Any]) -> None:
    Path("sft.json").unlink()


def unknown_setting(config: dict[str, Any]) -> None:
    config["model"]["TT"] = 1


def no_chats(config: dict[str, Any]) -> None:
    config["data"]["caches"]["sft_token_cache"] = "nowhere"


def other_model(config: dict[str, Any]) -> None:
    config["model"] |= {"C": 64, "mlp_bias": True}


def other_tokenizer(config: dict[str, Any]) -> None:
    data = bytearray(Path(config["tokenizer"]["model_path"]).read_bytes())
    Path("other.model").write_bytes(data.replace(b"\xe2\x96\x81the", b"\xe2\x96\x81teh"))
    config["tokenizer"]["model_path"] = "other.model"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (missing_file, r"sft\.json"),
        (unknown_setting, r"model\.TT"),
        (no_chats, r"no cache at nowhere/primer"),
        (
            other_model,
            r"both\.json and .*sft\.json differ in model\.C \(32, 64\), model\.mlp_bias \(False, True\); give",
        ),
        (other_tokenizer, r"differ in the tokenizer \([0-9a-f]{64}, [0-9a-f]{64}\)"),
    ],
)
def test_what_keeps_fine_tuning_from_starting_is_said_before_pretraining(
    pipeline: Path, spoil: Callable[[dict[str, Any]], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path("both.json").read_text())
    Path("sft.json").touch()
    pipeline.write_text(json.dumps({"pretrain_config_path": "both.json", "sft_config_path": "sft.json"}))
    spoil(config)
    if Path("sft.json").is_file():
        Path("sft.json").write_text(json.dumps(config))
    assert main(["--phase", "pipeline", "--config", str(pipeline), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert re.search(says, said) and said.count("error: ") == 1
    assert not Path("runs").exists() and not Path("checkpoints").exists()


@pytest.mark.parametrize("phase", ["sft", "pipeline"])
def test_a_byte_model_is_not_fine_tuned(pipeline: Path, phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No command could build chat caches for it."""
    config = json.loads(Path("both.json").read_text())
    config["tokenizer"], config["model"]["V"] = {"type": "byte"}, 256
    Path("both.json").write_text(json.dumps(config))
    chosen = pipeline if phase == "pipeline" else Path("both.json")
    assert main(["--phase", phase, "--config", str(chosen), "--device", "cpu"]) == 1
    expected = "error: a byte tokenizer has no sentinels; its models chat in text form\n"
    assert capsys.readouterr().err == expected and not Path("checkpoints/pretrain").exists()


def test_a_budget_is_shared_out_and_what_is_left_is_for_fine_tuning(pipeline: Path) -> None:
    found = budget_shares(TimeLimit(10.0), "both.json")
    assert found["pretrain"].minutes == pytest.approx(9) and found["sft"].minutes == pytest.approx(1)
    deadline = time.time() + 600
    found = budget_shares(TimeLimit(deadline=deadline), "both.json")
    assert found["pretrain"].deadline == pytest.approx(deadline - 60, abs=1) and found["sft"].deadline == deadline
    assert budget_shares(TimeLimit(), "both.json")["sft"] == TimeLimit()

    found = budget_shares(
        TimeLimit(deadline=deadline), "both.json", spent=400
    )  # of 1,000 seconds 900 are pretraining's
    assert found["pretrain"].deadline == pytest.approx(time.time() + 500, abs=60)

    arguments = ["--phase", "pipeline", "--config", str(pipeline), "--device", "cpu", "--minutes", "0.05"]
    assert main(arguments) == 0
    pretrain, sft = record("pretrain"), record("sft")
    assert pretrain["finished_s"] == pytest.approx(0.9 * 3)
    # What evaluating, saving and the last step did not need of pretraining's time has come to fine-tuning.
    assert sft["finished_s"] == pytest.approx(3 - pretrain["elapsed_s"]) and sft["is_finished"]


def test_print_config_shows_the_shares(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--phase", "pipeline", "--config", str(pipeline), "--minutes", "20", "--print_config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["pretrain"]["training"]["pretrain"]["minutes"] == pytest.approx(18)
    assert shown["sft"]["training"]["sft"]["minutes"] == pytest.approx(2)


def fine_tune(config: dict[str, Any], *flags: str) -> dict[str, Any]:
    """One step of `--phase sft`; the record it leaves."""
    config["training"]["sft"] |= {"total_steps": 1, "warmup_steps": 0}
    Path("sft.json").write_text(json.dumps(config))
    assert main(["--phase", "sft", "--config", "sft.json", "--device", "cpu", *flags]) == 0
    return record("sft")


def test_fine_tuning_alone_starts_from_what_pretraining_left(
    world: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fine_tune(world)["origin"] is None
    said = capsys.readouterr().err
    assert "fine-tuning starts from random weights: pretraining left no checkpoint in checkpoints/pretrain" in said
    best = run_pretrain(world, device="cpu", quiet=True)["best_path"]
    assert fine_tune(world)["origin"] is None  # it goes on with its own
    assert "resumed from checkpoints/sft/latest.pt" in capsys.readouterr().out
    assert fine_tune(world, "--no-resume")["origin"] == vars(Origin.of(best, ckpt.load_checkpoint(best, device="cpu")))
    assert f"sft init from {best}" in capsys.readouterr().out
    world["model"]["T"] = workshop.T // 2
    assert fine_tune(world, "--no-resume")["origin"] is None
    expected = (
        f"random weights: {best} does not fit: the checkpoint's model differs from the settings in model.T (checkpo"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--no-resume"]])
def test_damaged_pretraining_is_advised_to_be_done_again(
    world: dict[str, Any], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("checkpoints/pretrain")
    folder.mkdir(parents=True)
    (folder / "latest.pt").write_bytes(b"half")
    Path("sft.json").write_text(json.dumps(world))
    assert main(["--phase", "sft", "--config", "sft.json", "--device", "cpu", *flags]) == 1
    assert capsys.readouterr().err == (
        "error: every checkpoint in checkpoints/pretrain is damaged (latest.pt); restore one, or pretrain again:"
        " --phase pretrain --no-resume\n"
    )


def test_a_fine_tuned_checkpoint_knows_what_was_read_before(world: dict[str, Any]) -> None:
    for phase in ("pretrain", "sft"):
        world["training"][phase] |= {"total_steps": 1, "warmup_steps": 0}
    first, second = json.loads(json.dumps(world)), json.loads(json.dumps(world))
    assert set(first["data"]["mix_pretrain"]) == {"primer"}
    second["data"]["mix_pretrain"] = {"wikitext": 1.0}
    run_pretrain(first, device="cpu", quiet=True)
    run_sft(second, device="cpu", quiet=True, init_model_path=pretrained_model())
    known = {"pretraining": {"primer": 1.0}, "fine-tuning": {"primer": 1.0}}
    assert learned_by("sft") == known

    tuned = ckpt.phase_paths("sft").best.rename("tuned.pt")
    run_sft(second, device="cpu", quiet=True, no_auto_resume=True, init_model_path=tuned)
    assert learned_by("sft") == {**known, "fine-tuning 2": {"primer": 1.0}}
    run_sft(second, device="cpu", quiet=True, no_auto_resume=True)  # from random weights: nothing was read before
    assert learned_by("sft") == {"fine-tuning": {"primer": 1.0}}
    run_pretrain(first, device="cpu", quiet=True, resume_path=ckpt.phase_paths("sft").latest)
    assert learned_by("pretrain") == {"fine-tuning": {"primer": 1.0}, "pretraining": {"primer": 1.0}}


def learned_by(phase: str) -> dict[str, dict[str, float]]:
    path = ckpt.phase_paths(phase).latest
    loaded = ckpt.load_checkpoint(path, device="cpu")
    return learned_from(loaded, recorded_settings(loaded, path))


def test_the_best_of_an_older_run_is_not_fine_tuned(world: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="pretraining left no checkpoint in checkpoints/pretrain; run --phase pret"):
        pretrained_model()
    world["training"]["pretrain"] |= {"total_steps": 1, "warmup_steps": 0}
    run_pretrain(world, device="cpu", quiet=True)
    found = ckpt.phase_paths("pretrain")
    assert pretrained_model() == found.best
    world["training"]["pretrain"] |= {"save_best": False}
    run_pretrain(world, device="cpu", quiet=True, no_auto_resume=True)
    assert found.best.is_file() and pretrained_model() == found.latest
    found.best.unlink()
    assert pretrained_model() == found.latest


def test_time_that_an_unrelated_run_has_used_does_not_count(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh start and a checkpoint from elsewhere take nothing of the time from what lies in the folder."""
    main(["--phase", "pretrain", "--config", "both.json", "--device", "cpu"])
    real = ckpt.load_checkpoint

    def old(path: Any, **how: Any) -> ckpt.Checkpoint:
        loaded = real(path, **how)
        (loaded["resume"] or {})["elapsed_s"] = 36000.0 if "pretrain" in str(path) else 6000.0
        return loaded

    shutil.copy(ckpt.phase_paths("pretrain").latest, "elsewhere.pt")
    monkeypatch.setattr(ckpt, "load_checkpoint", old)
    until = datetime.fromtimestamp(time.time() + 60000).isoformat()

    def planned(*flags: str) -> float:
        capsys.readouterr()
        arguments = ["--phase", "pipeline", "--config", str(pipeline), "--until", until, "--print_config", *flags]
        assert main(arguments) == 0
        minutes: float = json.loads(capsys.readouterr().out)["pretrain"]["training"]["pretrain"]["minutes"]
        return minutes * 60

    seen: list[float] = []

    def pretrain(*_: Any, limit: TimeLimit, **__: Any) -> dict[str, Any]:
        assert limit.deadline is not None
        seen.append(limit.deadline - time.time())
        return {}

    monkeypatch.setattr(pipeline_module, "run_pretrain", pretrain)
    monkeypatch.setattr(pipeline_module, "run_sft", lambda *_, **__: {})
    for flags, how, spent in (
        ([], {}, 36000.0),
        (["--no-resume"], {"no_auto_resume": True}, 0.0),
        (["--resume", "elsewhere.pt"], {"resume_path": "elsewhere.pt"}, 6000.0),
    ):
        whole = 0.9 * (60000 + spent)
        run_pipeline(pipeline, device="cpu", limit=TimeLimit(deadline=time.time() + 60000), **how)  # type: ignore[arg-type]
        assert seen.pop() == pytest.approx(whole - spent, abs=200)
        assert planned(*flags) == pytest.approx(whole, abs=200)


def test_paths_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"pretrain_config_path": "a.json", "sft_config_path": 3}))
    with pytest.raises(ValueError, match=r"pipeline\.json: sft_config_path must be the path of a config file, not 3"):
        pipeline_configs(path)
