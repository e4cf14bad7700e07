"""Checkpoints under fire: kill -9, power cuts, failing calls, full disks."""

import builtins
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from niels_gpt import paths
from niels_gpt.checkpoint import load_checkpoint, newest_good, phase_paths, publish, step_path
from tests.checkpoint.crash_states import Recording, crash_states
from tests.checkpoint.failing import FailingCall, newly_written
from tests.checkpoint.samples import save

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261123
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses fork and /proc as Linux has them")


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def save_and_publish(step: int) -> None:
    save(step_path("pretrain", step), step=step, optimizer=None)
    publish("pretrain", step, is_best=True, keep_last=2, sidecar={"step": step})


def killed(folder: Path, **kills: int) -> dict[str, dict[str, int]]:
    """Tallies of `tests.checkpoint.killing`, in memory where there is such a folder: 10x as many kills a second."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else folder
    asked = [str(word) for pair in kills.items() for word in pair]
    with tempfile.TemporaryDirectory(dir=memory) as place:
        command = [sys.executable, "-m", "tests.checkpoint.killing", str(SEED), place, *asked]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[str, dict[str, int]]:
    return killed(tmp_path_factory.mktemp("killed"), ours=20, naive=10)


@linux_only
@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.soak)])
def test_kill_9_in_the_write_loop(tmp_path, few, kills):
    tally = few["ours"] if kills == 20 else killed(tmp_path, ours=kills)["ours"]
    assert tally["leftovers"] > 0, "no kill hit a half-written file: the harness is blind"
    assert tally == {
        "kills": kills,
        "unloadable": 0,
        "torn": 0,
        "lost": 0,
        "leftovers": tally["leftovers"],
        "unswept": 0,
        "children_failed": 0,
    }


@linux_only
def test_the_kill_harness_sees_a_naive_writer_fail(few):
    assert few["naive"]["unloadable"] >= 3
    assert few["naive"]["children_failed"] == 0


@pytest.fixture
def recording(checkpoints, monkeypatch) -> SimpleNamespace:
    """Step 1 on disk; then the recorded operations of saving and publishing step 2."""
    save_and_publish(1)
    before = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    found = Recording(checkpoints)
    with monkeypatch.context() as patch:
        found.install(patch)
        save_and_publish(2)
    return SimpleNamespace(recording=found, before=before)


def after_crash(names: dict[Path, bytes], folder: Path) -> tuple[int, bool]:
    """Lay the files out, then the step that recovery finds and whether every named checkpoint is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in names.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    whole = True
    for path in (p for p in names if p.suffix == ".pt" and not p.name.startswith(".")):
        try:
            load_checkpoint(path, device="cpu")
        except ValueError:
            whole = False
    found = newest_good("pretrain")
    return (load_checkpoint(found, device="cpu")["step"] if found else 0), whole


def outcomes(recorded: SimpleNamespace, folder: Path, forget: tuple[str, ...] = ()) -> Iterator[tuple[int, int, bool]]:
    """(newest acknowledged step, recovered step, everything whole) of each distinct state."""
    total = len([o for o in recorded.recording.operations if o[0] not in forget])
    known: dict[frozenset[tuple[Path, bytes]], tuple[int, bool]] = {}
    for done, names in crash_states(recorded.recording, recorded.before, forget=forget):
        state = frozenset((p, c) for p, c in names.items() if not p.name.startswith("."))
        if state not in known:
            known[state] = after_crash(names, folder)
        yield 2 if done == total else 1, *known[state]


@linux_only
def test_every_state_a_power_cut_may_leave_is_the_old_or_the_new(checkpoints, recording):
    found = list(outcomes(recording, checkpoints))
    assert len(found) > 50
    assert {step for _, step, _ in found} == {1, 2}
    for acknowledged, step, whole in found:
        assert whole and step >= acknowledged


@linux_only
def test_the_power_cut_model_sees_missing_fsyncs(checkpoints, recording):
    assert any(not whole for _, _, whole in outcomes(recording, checkpoints, ("sync",)))
    assert any(step < acknowledged for acknowledged, step, _ in outcomes(recording, checkpoints, ("sync folder",)))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=errno.errorcode.get)
def test_any_single_failing_call_leaves_the_previous_file(checkpoints, monkeypatch, number):
    path = checkpoints / "a.pt"
    save(path, step=1)
    before = path.read_bytes()
    outcomes = []
    while "no call failed" not in outcomes:
        with monkeypatch.context() as patch:
            FailingCall(len(outcomes) + 1, number, checkpoints, patch)
            try:
                save(path, step=2)
                outcomes.append("no call failed")
            except OSError as error:
                assert error.errno == number
                if number == errno.ENOSPC:
                    assert "the disk is full" in str(error) and str(path) in str(error)
                outcomes.append("old" if path.read_bytes() == before else "new")
        assert [p.name for p in checkpoints.iterdir()] == ["a.pt"], "something is left over"
    # open, open (verify), open (sync), fsync, replace; then the folder's open and fsync, with the new file in place
    assert outcomes == ["old"] * 5 + ["new"] * 2 + ["no call failed"]
    assert load_checkpoint(path, device="cpu")["step"] == 2


def test_any_single_failing_call_while_publishing_leaves_whole_files(checkpoints, monkeypatch):
    save_and_publish(1)
    n = failures = 0
    sound: set[tuple[int, ...]] = set()  # files that have loaded, and have not changed since
    while True:
        n += 1
        with monkeypatch.context() as patch:
            failing = FailingCall(n, errno.EIO, checkpoints, patch)
            try:
                save_and_publish(n + 1)
            except OSError as error:
                failures += 1
                assert error.errno == errno.EIO
        for path in newly_written(checkpoints, sound):
            assert load_checkpoint(path, device="cpu")["step"] >= 1
        assert not list(checkpoints.rglob("*.tmp"))
        assert newest_good("pretrain") == phase_paths("pretrain").latest
        if failing.count < n:
            break
    assert load_checkpoint(phase_paths("pretrain").latest, device="cpu")["step"] == n + 1
    assert failures > 30  # all but the hard links, which fall back to copies


@pytest.mark.parametrize("limit", [0, 100, 5_000, 20_000, 40_000, 60_000])
def test_a_full_disk_is_said_so_and_the_previous_file_stays(checkpoints, limit):
    path = checkpoints / "a.pt"
    save(path, step=1)
    before = path.read_bytes()
    assert len(before) > 60_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # writes beyond it fail like those to a full disk
        with pytest.raises(OSError, match="the disk is full") as caught:
            save(path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value) and "MB are free" in str(caught.value)
    assert path.read_bytes() == before
    assert list(checkpoints.iterdir()) == [path]


def test_a_disk_without_room_is_noticed_before_anything_is_written(checkpoints, monkeypatch):
    path = checkpoints / "a.pt"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match="the disk is full") as caught:
        save(path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(checkpoints.iterdir())


def test_what_was_written_is_read_back_before_it_counts(checkpoints, monkeypatch):
    """Memory or a disk that changes a bit on the way is noticed while the previous file is still there."""
    path = checkpoints / "a.pt"
    save(path, step=1)
    before, real = path.read_bytes(), torch.save

    def save_with_a_flip(content, file):
        real(content, file)
        file.seek(file.tell() // 2)
        file.write(b"\xa5")

    monkeypatch.setattr(torch, "save", save_with_a_flip)
    with pytest.raises(ValueError, match="damaged"):
        save(path, step=2)
    assert path.read_bytes() == before
    assert list(checkpoints.iterdir()) == [path]


def test_what_torch_hides_behind_its_own_error_is_the_error(checkpoints, monkeypatch):
    """torch.save turns a failed write into RuntimeError("unexpected pos"), whatever the write failed of."""
    path = checkpoints / "a.pt"

    class Broken:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            if len(content) > 1000:
                raise OSError(errno.EIO, "I/O error")
            return self.file.write(content)

    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda f, mode="r", *a, **k: Broken(real(f, mode)) if mode == "wb" else real(f, mode, *a, **k)
    )
    with pytest.raises(OSError) as caught:
        save(path)
    assert caught.value.errno == errno.EIO
    assert not list(checkpoints.iterdir())
