"""Several processes under torchrun do what one does: the same bits, however many, and together or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train import distributed
from niels_gpt.train.distributed import World, joined
from niels_gpt.train.loop import Loop
from niels_gpt.train.pretrain import pretrain_job, run_pretrain
from niels_gpt.train.report import reporter_for
from niels_gpt.train.start import start_phase
from tests.train import workshop

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

STEPS = 50
CLIP = 0.05  # far below the norms of this model, so that every step is clipped
NO_CLIP = 1e9


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", *arguments]


def config(folder: Path, tokenizer: SentencePieceTokenizer, **phase: Any) -> dict[str, Any]:
    options = {"steps": STEPS, "eval_every": 20, "eval_steps": 3, "ckpt_every": 10, "keep_last": 9, "grad_clip": CLIP}
    return workshop.overrides(folder, tokenizer, **{**options, **phase})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A folder with caches, and a run of one process in `one`."""
    folder = tmp_path_factory.mktemp("distributed")
    workshop.build_caches(folder, tiny_tokenizer)
    alone(folder / "one", config(folder, tiny_tokenizer))
    return folder


def alone(folder: Path, settings: dict[str, Any], resume: Path | None = None) -> dict[str, Any]:
    """Train in this process."""
    folder.mkdir(exist_ok=True)
    here = Path.cwd()
    os.chdir(folder)
    try:
        return run_pretrain(settings, device="cpu", resume_path=resume, quiet=True)
    finally:
        os.chdir(here)


def together(folder: Path, cases: list[dict[str, Any]], *, processes: int = 2, succeeds: bool = True) -> str:
    """Run the cases in several processes started by torchrun; returns what they said on stderr."""
    for case in cases:
        case.update({key: str(folder / case[key]) for key in ("folder", "resume") if key in case})
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        torchrun("tests.train.ranks", str(folder / "cases.json"), processes=processes),
        cwd=folder,
        env=workshop.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode == 0) is succeeds, f"{done.stdout[-1000:]}\n{done.stderr[:6000]}"
    said = [line for line in done.stderr.splitlines() if "warning" in line.lower() and "out of memory" not in line]
    assert not said, said
    return done.stderr


def latest(folder: Path) -> Path:
    return folder / "checkpoints/pretrain/latest.pt"


def same(a: Path, b: Path) -> None:
    """Both runs have the same losses and the same weights, moments and best loss, to the bit."""
    assert workshop.steps_logged(a) == workshop.steps_logged(b)
    assert workshop.weights_sha(latest(a)) == workshop.weights_sha(latest(b))
    best = [load_checkpoint(latest(folder), device="cpu")["best_val_loss"] for folder in (a, b)]
    assert best[0] == best[1] is not None
    sizes = [latest(folder).stat().st_size for folder in (a, b)]
    assert abs(sizes[0] - sizes[1]) < 4096  # a tied weight that became two would be 64 KiB


def largest_difference(a: Path, b: Path) -> float:
    x, y = (load_checkpoint(latest(folder), device="cpu")["model_state"] for folder in (a, b))
    return max(float((x[name] - y[name]).abs().max()) for name in x)


def test_two_processes_are_one(
    ground: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 steps of DDP with dropout and clipping, elastic 1 -> 2 -> 1, FSDP, and what only one process sees go wrong."""
    ddp = config(ground, tiny_tokenizer)
    fsdp = config(ground, tiny_tokenizer, steps=16, ckpt_every=8, parallel="fsdp", grad_clip=NO_CLIP)
    alone(ground / "unclipped", fsdp)
    cases = [
        {"action": "run", "folder": "two", "config": ddp},
        {"action": "run", "folder": "elastic", "config": ddp, "resume": "one/checkpoints/pretrain/step_0000020.pt"},
        {"action": "run", "folder": "sharded", "config": fsdp},
        {
            "action": "run",
            "folder": "resharded",
            "config": fsdp,
            "resume": "unclipped/checkpoints/pretrain/step_0000008.pt",
        },
        {"action": "stop", "folder": "stopped", "config": ddp},
        {"action": "poison", "folder": "poison", "config": ddp},
        {"action": "scarce", "folder": "scarce", "config": without_dropout(ddp)},
        {"action": "metric", "folder": "metric", "config": ddp, "resume": "one/checkpoints/pretrain/latest.pt"},
        {"action": "refusals", "folder": "refusals", "config": ddp},
        {"action": "hang", "folder": "hung", "config": config(ground, tiny_tokenizer, silence_s=3)},
    ]
    said = together(ground, cases, succeeds=False)
    ended = time.time()
    same(ground / "one", ground / "two")
    _goes_on_alone(ground, ddp)
    same(ground / "unclipped", ground / "sharded")
    assert workshop.weights_sha(latest(ground / "resharded")) == workshop.weights_sha(latest(ground / "unclipped"))

    assert result(ground / "stopped") == [f"stopped by signal {signal.SIGTERM} after step 6"] * 2
    assert load_checkpoint(latest(ground / "stopped"), device="cpu")["step"] == 6
    assert result(ground / "poison") == [[True, False, False, False, True]] * 2
    first, second = result(ground / "scarce")
    assert first == second and first[2:] == [2, 4, 2]  # rows, microbatches, rows of an evaluation
    assert first[0] == pytest.approx(losses_alone(ground / "wide", without_dropout(ddp), monkeypatch), rel=1e-5)

    counted = alone(ground / "counted", ddp, latest(ground / "one"))  # nothing is left to do: it only evaluates
    assert counted["final_step"] == STEPS
    evals = result(ground / "metric")
    nats, tokens = evals[0]["primer"]
    assert evals[0] == evals[1] and float.fromhex(nats) / tokens == counted["last_val_loss"]

    main, other = result(ground / "refusals")
    assert main[0] == "ValueError: the disk has gone"
    assert other[0] == "MainFailed: process 0 failed: ValueError: the disk has gone"
    assert all("data differs between the processes" in said for said in (main[1], other[1]))

    assert "process 0 of this run has shown no sign of life for 3 s" in said
    last_step = max(path.stat().st_mtime for path in (ground / "hung").glob("runs/*/metrics.jsonl"))
    assert ended - last_step < 15
    assert not any(psutil.pid_exists(int((ground / f"hung/pid{rank}").read_text())) for rank in (0, 1))
    alone(ground / "hung", ddp)
    same(ground / "one", ground / "hung")


def _goes_on_alone(ground: Path, settings: dict[str, Any]) -> None:
    """One process takes up the run at step 40, after two have had it from step 20."""
    assert min(workshop.steps_logged(ground / "elastic", "pretrain")) == 21
    (ground / "back").mkdir()
    shutil.copytree(ground / "one/runs", ground / "back/runs")  # the losses up to here
    alone(ground / "back", settings, ground / "elastic/checkpoints/pretrain/step_0000040.pt")
    same(ground / "one", ground / "back")


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_sharded_steps(
    ground: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, optimizer: str
) -> None:
    """To the bit; where gradients are clipped the norm is summed shard by shard, which costs the last ones."""
    options = {"parallel": "fsdp", "optimizer": optimizer, "base_lr": 1e-3, "min_lr": 1e-4}
    clipped = config(ground, tiny_tokenizer, **options)
    unclipped = config(ground, tiny_tokenizer, **options, grad_clip=NO_CLIP)
    alone(tmp_path / "one", clipped)
    alone(tmp_path / "free", unclipped)
    cases = [
        {"action": "run", "folder": "two", "config": clipped},
        {"action": "run", "folder": "two free", "config": unclipped},
    ]
    together(tmp_path, cases)
    same(tmp_path / "free", tmp_path / "two free")
    assert 0 < largest_difference(tmp_path / "one", tmp_path / "two") <= 1e-6


@pytest.mark.soak
def test_three_processes_resume_to_the_bit(
    ground: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    """With three the order of a sum matters: they differ from one process, but not from themselves."""
    settings = config(ground, tiny_tokenizer, micro_B=4, accum_steps=3)
    alone(tmp_path / "one", settings)
    cases = [
        {"action": "run", "folder": "three", "config": settings},
        {
            "action": "run",
            "folder": "again",
            "config": settings,
            "resume": "three/checkpoints/pretrain/step_0000030.pt",
        },
    ]
    together(tmp_path, cases, processes=3)
    assert workshop.weights_sha(latest(tmp_path / "again")) == workshop.weights_sha(latest(tmp_path / "three"))
    assert largest_difference(tmp_path / "one", tmp_path / "three") <= 1e-5


def without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "model": {**settings["model"], "dropout": 0.0}}


def losses_alone(folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the first three steps of one process, as `ranks.scarce` takes them."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    start = start_phase("pretrain", settings, device="cpu", resume_path=None, no_auto_resume=True)
    reporter = reporter_for(start.world, "pretrain", start.resolved.run_id, quiet=True)
    loop = Loop(pretrain_job(start), device="cpu", reporter=reporter, resume=None, init=None)
    return [loop.train_step(number).loss for number in range(3)]


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


ARGUMENTS = ("--phase", "pretrain", "--config", "config.json", "--device", "cpu")


class Job:
    """`torchrun -m train.run` in a folder, with the processes that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began_at = max(workshop.steps_logged(folder), default=0)
        self.errors = folder / "stderr.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                torchrun("train.run", *ARGUMENTS),
                cwd=folder,
                env=workshop.environment(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def ranks(self, after: int) -> list[psutil.Process]:
        """Processes 0 and 1, as soon as the run is `after` steps beyond where this job found it."""
        deadline = time.monotonic() + 120
        while max(workshop.steps_logged(self.folder), default=0) < self.began_at + after:
            assert self.process.poll() is None, f"ended by itself: {self.errors.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{after} steps were not reached: {self.errors.read_text()[-2000:]}"
            time.sleep(0.01)
        children = psutil.Process(self.process.pid).children()
        return sorted((p for p in children if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))

    def ends(self, ranks: list[psutil.Process]) -> str:
        """Wait 15 s for the job's end and that of all its processes; what they said on stderr."""
        assert len(ranks) == 2
        assert self.process.wait(timeout=15) != 0
        _, alive = psutil.wait_procs(ranks, timeout=1)
        assert not alive, "orphans are left"
        return self.errors.read_text()


@pytest.mark.soak
@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(("kill 0", "signal", "hang"), id="three ends"),
        pytest.param(("hang", "signal", "kill 1", "kill 0", "signal"), id="five ends"),
    ],
)
def test_one_ends_all(
    ground: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, ends: tuple[str, ...]
) -> None:
    """Whatever ends one process ends the job within 15 s; resumed, the run is as if nothing had disturbed it."""
    settings = config(ground, tiny_tokenizer, steps=24 + 16 * len(ends), ckpt_every=5, silence_s=4)
    alone(tmp_path / "straight", settings)
    folder = tmp_path / "disturbed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    for how in ends:
        job = Job(folder)
        ranks = job.ranks(after=8)
        if how == "signal":
            ranks[1].terminate()  # one of them is told; all save and leave
            said = job.ends(ranks)
            saved = load_checkpoint(latest(folder), device="cpu")["step"]
            assert f"stopped by signal {signal.SIGTERM} after step {saved}; saved to" in said
        elif how == "hang":
            ranks[0].suspend()
            assert "process 0 of this run has shown no sign of life for 4 s" in job.ends(ranks)
        else:
            ranks[int(how[-1])].kill()
            assert "another process of this run has ended or does not answer" in job.ends(ranks)
    alone(folder, settings)
    same(tmp_path / "straight", folder)


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where PyTorch is built without torch.distributed."""
    monkeypatch.setattr(distributed, "dist", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("mps") as world:
        assert world == World() and world.is_main
        assert world.sum(2, math.inf) == [2, math.inf] and world.largest(7) == 7 and world.gather("a") == ["a"]
        assert world.from_main(lambda: {"a": 1}) == {"a": 1}
        world.check_same(data="a")


@pytest.mark.parametrize(
    ("device", "available", "message"),
    [
        ("cpu", False, "built without torch.distributed"),
        ("mps", True, "cannot share a Metal GPU"),
        ("cuda", True, "this machine has 1 CUDA GPU.* give --nproc-per-node 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, available: bool, message: str
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message), joined(device):
        raise AssertionError("joined")
