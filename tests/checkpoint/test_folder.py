"""Publishing, retention and going back to what is sound."""

import json
import os
from pathlib import Path

import pytest

from niels_gpt import files, paths
from niels_gpt.checkpoint import (
    load_checkpoint,
    newest_good,
    phase_paths,
    prepare_phase,
    publish,
    sidecar_path,
    step_path,
)
from tests.checkpoint.samples import save


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def write(step: int, phase: str = "pretrain", **options) -> Path:
    """Save and publish a step; each file is a second younger than the one before, whatever the clock's resolution."""
    path = step_path(phase, step)
    save(path, step=step, optimizer=None)
    write.clock = getattr(write, "clock", 1_000_000_000) + 1
    os.utime(path, (write.clock, write.clock))
    publish(phase, step, **{"is_best": False, "keep_last": 3, **options})
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    written = path.stat().st_mtime_ns
    files.write_bytes(path, content)  # a new file: hard links of it stay sound
    os.utime(path, ns=(written, written))


def steps(phase: str = "pretrain") -> list[int]:
    return sorted(int(p.stem.removeprefix("step_")) for p in phase_paths(phase).step_dir.glob("step_*.pt"))


def test_paths_are_read_at_call_time_and_phases_are_checked(checkpoints, monkeypatch):
    assert phase_paths("sft").latest == checkpoints / "sft" / "latest.pt"
    assert phase_paths("sft").best == checkpoints / "sft" / "best.pt"
    assert step_path("pretrain", 1200) == checkpoints / "pretrain" / "step_0001200.pt"
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", Path("elsewhere"))
    assert phase_paths("sft").step_dir == Path("elsewhere/sft")
    with pytest.raises(ValueError, match="pretrain, sft"):
        phase_paths("../sft")


def test_publish_makes_latest_best_root_copies_and_sidecars(checkpoints):
    one = write(1, is_best=True, sidecar={"run": 1})
    two = write(2, sidecar={"run": 2})
    expected = {"pretrain/latest.pt": two, "latest.pt": two, "pretrain/best.pt": one, "best.pt": one}
    for name, source in expected.items():
        assert files.sha256_file(checkpoints / name) == files.sha256_file(source), name
        sidecar = json.loads((checkpoints / f"{name}.resolved_settings.json").read_text())
        assert sidecar == {"run": load_checkpoint(source, device="cpu")["step"]}
    assert json.loads(sidecar_path(one).read_text()) == {"run": 1}


def test_root_copies_follow_the_last_phase_that_wrote(checkpoints):
    write(5, is_best=True)
    assert load_checkpoint(checkpoints / "best.pt", device="cpu")["step"] == 5
    write(1, "sft", is_best=True)
    assert files.sha256_file(checkpoints / "best.pt") == files.sha256_file(phase_paths("sft").best)
    assert load_checkpoint(phase_paths("pretrain").best, device="cpu")["step"] == 5


def test_an_older_sidecar_does_not_describe_newer_weights(checkpoints):
    write(1, sidecar={"run": 1})
    write(2)
    assert not (checkpoints / "latest.pt.resolved_settings.json").exists()


def test_retention_keeps_the_newest_the_best_and_the_resumed():
    first, second = write(1), write(2, is_best=True)
    for step in range(3, 9):
        write(step, keep_last=3, spared=[first], sidecar={"step": step})
    assert steps() == [1, 2, 6, 7, 8]
    assert second.samefile(phase_paths("pretrain").best)
    kept = {p.name for p in phase_paths("pretrain").step_dir.glob("step_*.json")}
    assert kept == {f"step_{s:07d}.pt.resolved_settings.json" for s in (6, 7, 8)}


@pytest.mark.parametrize("keep_last", [-1, 0, 1, 2])
def test_retention_never_keeps_fewer_than_two(keep_last):
    for step in range(1, 5):
        write(step, keep_last=keep_last)
    assert steps() == [3, 4]


def test_damaged_files_do_not_count_for_retention():
    for step in range(1, 4):
        write(step, keep_last=3)
    damage(step_path("pretrain", 2))
    damage(step_path("pretrain", 3))
    write(4, keep_last=2)
    assert steps() == [1, 2, 3, 4]  # 4 and 1 are the two sound ones
    write(5, keep_last=2)
    assert steps() == [4, 5]
    assert newest_good("pretrain") == phase_paths("pretrain").latest


def test_a_fresh_run_in_an_old_folder_does_not_lose_its_own_files():
    for step in (1000, 2000, 3000):
        write(step, keep_last=2)
    for step in (10, 20):
        write(step, keep_last=2)
    assert steps() == [10, 20]


def test_nothing_there():
    assert newest_good("pretrain") is None
    prepare_phase("pretrain")
    assert newest_good("pretrain") is None


def test_a_sound_latest_is_taken_quietly(capsys):
    write(1)
    write(2)
    assert newest_good("pretrain") == phase_paths("pretrain").latest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_damaged_latest_falls_back_to_the_newest_sound_step_loudly(capsys, how):
    for step in (1, 2, 3):
        write(step)
    latest = phase_paths("pretrain").latest
    damage(step_path("pretrain", 3))
    if how == "flip":
        damage(latest)
    else:
        files.write_bytes(latest, latest.read_bytes()[: 0 if how == "empty" else 5000])
    found = newest_good("pretrain")
    assert found == step_path("pretrain", 2)
    assert load_checkpoint(found, device="cpu")["step"] == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "latest.pt" in said and "step_0000003.pt" in said and "DAMAGED" in said and "step_0000002.pt" in said


def test_a_step_that_was_never_published_is_found():
    save(step_path("pretrain", 4), step=4)
    assert newest_good("pretrain") == step_path("pretrain", 4)


def test_best_is_the_last_resort_and_all_damaged_is_an_error(capsys):
    path = write(1, is_best=True)
    for bad in (phase_paths("pretrain").latest, path):
        damage(bad)
    assert newest_good("pretrain") == phase_paths("pretrain").best
    damage(phase_paths("pretrain").best)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        newest_good("pretrain")


def test_prepare_sweeps_what_dead_writers_left(checkpoints):
    folder = prepare_phase("pretrain").step_dir
    dead = 2**22 + 1  # above the largest pid
    left = [f / f".latest.pt.{dead}.0123abcd.tmp" for f in (folder, checkpoints)]
    other = [folder / ".hidden.tmp", folder / f".a.pt.{os.getppid()}.0123abcd.tmp"]  # not ours; still being written
    for path in left + other:
        path.write_bytes(b"half")
    prepare_phase("pretrain")
    assert not any(p.exists() for p in left)
    assert all(p.exists() for p in other)
