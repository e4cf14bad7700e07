"""Downloading checkpoints through the real library, against a hub on loopback: faults included."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from niels_gpt.chat import Conversation, build_options
from niels_gpt.checkpoint import load_model
from niels_gpt.hub import download, upload
from niels_gpt.hub.fetch import CHUNK
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.checkpoint.published import V1_SHAPES, V2_SHAPES, checkpoint_bytes
from tests.hub.here import REPO, V1_FILE, Here
from tests.hub.server import Fault, LoopbackHub
from tests.hub.worker import ROOT, Worker


def test_the_published_file_arrives_and_chats(here: Here, faulty: list[Fault], hub: LoopbackHub) -> None:
    assert here.download() == 0
    assert here.best.read_bytes() == V1_FILE and here.names() == ["best.pt"]
    assert "parameters of the first generation, bytes, context 64, step 1,000" in here.said
    assert here.said.endswith("talk to it: niels-gpt chat --ckpt checkpoints/best.pt\n")
    conversation = Conversation(load_model(here.best, device="cpu"), build_options(None, "", max_new_tokens=5))
    list(conversation.reply("hi"))
    assert conversation.reply_steps
    asked = list(hub.requests)
    before = here.best.stat().st_mtime_ns
    assert here.download() == 0
    assert hub.requests == asked and here.best.stat().st_mtime_ns == before  # there already: the hub is not asked
    assert "is there already and is not downloaded again" in here.said and "warning" not in here.said
    here.best.write_bytes(b"mine")
    assert here.download() == 1 and here.best.read_bytes() == b"mine" and "talk to it" not in here.said
    assert "not a sound checkpoint" in here.error() and "move it away" in here.error() and hub.requests == asked


def test_other_names_and_revisions(here: Here, hub: LoopbackHub, faulty: list[Fault]) -> None:
    older = checkpoint_bytes("v1", V1_SHAPES[0], seed=7)
    old = hub.publish("some/one", {"runs/a/small.pt": older}, kind="model")
    hub.publish("some/one", {"runs/a/small.pt": V1_FILE}, kind="model")
    flags = ("--repo", "some/one", "--file", "runs/a/small.pt", "--out", "elsewhere")
    assert here.download(*flags, "--revision", old) == 0
    assert (here.folder / "elsewhere/small.pt").read_bytes() == older and here.names() == ["small.pt"]


def test_a_second_generation_brings_its_tokenizer(
    here: Here, hub: LoopbackHub, tiny_tokenizer: SentencePieceTokenizer, faulty: list[Fault]
) -> None:
    sha = tiny_tokenizer.sha256
    published = checkpoint_bytes("v2", V2_SHAPES[1], tokenizer_sha256=sha)
    hub.publish("some/v2", {"best.pt": published, "spm.model": tiny_tokenizer.model_bytes}, kind="model")
    hub.publish(
        "some/other", {"best.pt": published, "spm.model": tiny_tokenizer.model_bytes + b"\xfa\x7f\x01A"}, kind="model"
    )
    hub.publish("some/alone", {"best.pt": published}, kind="model")
    assert here.download("--repo", "some/v2") == 0 and here.names() == ["best.pt", "spm.model"]
    assert load_model(here.best, device="cpu").tokenizer.sha256 == sha
    for repo, told in (("some/other", "was trained with"), ("some/alone", "no such file")):
        assert here.download("--repo", repo, "--out", repo) == 0
        assert [p.name for p in (here.folder / repo).iterdir()] == ["best.pt"], repo
        assert f"needs its tokenizer (sha256 {sha})" in here.said and told in here.said


def test_a_tokenizer_that_did_not_come_is_brought_by_the_next_download(
    here: Here, hub: LoopbackHub, tiny_tokenizer: SentencePieceTokenizer, faulty: list[Fault]
) -> None:
    published = checkpoint_bytes("v2", V2_SHAPES[1], tokenizer_sha256=tiny_tokenizer.sha256)
    hub.publish("some/two", {"best.pt": published, "spm.model": tiny_tokenizer.model_bytes}, kind="model")
    faulty.append(Fault("status", "spm.model", code=403, method="HEAD"))
    assert here.download("--repo", "some/two") == 1 and "spm.model" in here.error() and here.names() == ["best.pt"]
    assert here.download("--repo", "some/two") == 0 and "its tokenizer did not come" in here.said
    faulty.clear()
    assert here.download("--repo", "some/two") == 0 and here.names() == ["best.pt", "spm.model"]
    assert load_model(here.best, device="cpu").tokenizer.sha256 == tiny_tokenizer.sha256


@pytest.mark.parametrize(
    "fault",
    [
        Fault("truncate", "/cdn/", times=1),
        Fault("truncate", "/cdn/", times=4),
        Fault("short", "/cdn/", times=1),
        Fault("whole", "/cdn/"),
        Fault("status", "/cdn/", code=500, times=2),
        Fault("status", "/resolve/", code=503, times=2),
        Fault("status", "/resolve/", method="HEAD", code=500, times=2),
        Fault("status", "/cdn/", code=429, times=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.code}-{fault.times}",
)
def test_what_passes_is_waited_for(here: Here, faulty: list[Fault], fault: Fault) -> None:
    faulty.append(Fault(**vars(fault)))
    assert here.download() == 0, here.said
    assert here.best.read_bytes() == V1_FILE and here.names() == ["best.pt"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("corrupt", "/cdn/"), "damaged on its way"),
        (Fault("flip", "/cdn/"), "damaged on its way"),
        (Fault("short", "/cdn/"), "broke off"),
        (Fault("status", "/cdn/", code=500), "answers with an error (500) again and again"),
        (Fault("status", "/cdn/", code=429), "fewer requests"),
        (Fault("status", "/resolve/", method="HEAD", code=401), "hf auth login"),
        (Fault("status", "/resolve/", method="HEAD", code=403), "(403)"),
        (Fault("status", "/resolve/", method="HEAD", code=404), "no such public model"),
        (Fault("hang", "/resolve/", method="HEAD", seconds=0.2), "the transfer broke off"),
    ],
    ids=lambda value: f"{value.kind}-{value.code}" if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_is_one_line_and_no_file(here: Here, faulty: list[Fault], fault: Fault, told: str) -> None:
    faulty.append(Fault(**vars(fault)))
    assert here.download() == 1
    assert told in here.error() and f"{REPO}: best.pt" in here.error()
    assert not here.best.exists()
    faulty.clear()
    assert here.download() == 0 and here.best.read_bytes() == V1_FILE  # what was wrong was not kept
    assert here.names() == ["best.pt"]


def test_a_download_that_broke_off_goes_on_where_it_was(here: Here, hub: LoopbackHub, faulty: list[Fault]) -> None:
    faulty += [Fault("truncate", "/cdn/", at=0.75, times=1), Fault("status", "/cdn/", code=403)]
    assert here.download() == 1
    here.error()
    have = sum(path.stat().st_size for path in (here.folder / "checkpoints").rglob("best.pt"))
    assert 0.75 * len(V1_FILE) - CHUNK <= have <= 0.75 * len(V1_FILE) and not here.best.exists()
    faulty.clear()
    hub.ranges.clear()
    assert here.download() == 0 and hub.ranges == [f"bytes={have}-"]
    assert here.best.read_bytes() == V1_FILE and here.names() == ["best.pt"]


def test_a_killed_download_goes_on_where_it_was(here: Here, hub: LoopbackHub, faulty: list[Fault]) -> None:
    faulty.append(Fault("stall", "/cdn/", seconds=300, at=0.5))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/download_checkpoint.py")],
        cwd=here.folder,
        env={**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(here.folder / "hf"), "HF_HUB_DISABLE_XET": "1"},
        stderr=subprocess.DEVNULL,
    )
    parts: list[Path] = []
    while not parts or parts[0].stat().st_size < len(V1_FILE) // 4:
        assert process.poll() is None
        parts = list((here.folder / "checkpoints").rglob("best.pt"))
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = parts[0].stat().st_size
    assert not here.best.exists() and 0 < have < len(V1_FILE)
    faulty.clear()
    hub.ranges.clear()
    assert here.download() == 0 and here.best.read_bytes() == V1_FILE and hub.ranges == [f"bytes={have}-"]


class Code:
    """What a pickle must not bring."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def test_what_is_no_checkpoint_is_refused(here: Here, hub: LoopbackHub, faulty: list[Fault]) -> None:
    pickled, zipped = io.BytesIO(), io.BytesIO()
    torch.save({"model_cfg": {}, "train_cfg": {}, "model_state": Code(), "step": 1}, pickled)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", "no model" * 999)
    untied = torch.load(io.BytesIO(V1_FILE), weights_only=True)
    untied["model_state"]["lm_head.weight"] = untied["model_state"]["lm_head.weight"] + 1
    other = io.BytesIO()
    torch.save(untied, other)
    bad = {"code": pickled.getvalue(), "zip": zipped.getvalue(), "text": b"<html>" * 999, "untied": other.getvalue()}
    hub.publish("some/bad", {f"{name}.pt": content for name, content in bad.items()}, kind="model")
    for name in bad:
        assert here.download("--repo", "some/bad", "--file", f"{name}.pt") == 1
        assert "some/bad" in here.error() or name == "untied", here.said
        assert "(it was not kept)" in here.error() and here.names() == []


def test_what_is_not_there(here: Here, faulty: list[Fault]) -> None:
    for flags, told in (
        (("--repo", "nobody/nothing"), "there is no such public model on the hub"),
        (("--file", "worst.pt"), "there is no such file in the repository"),
        (("--revision", "v9"), "there is no revision 'v9' of it"),
    ):
        assert here.download(*flags) == 1 and told in here.error()
        assert here.names() == []


@pytest.mark.parametrize("program", [download, upload], ids=["download", "upload"])
def test_a_name_that_no_model_can_have_is_wrong_usage(
    program: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, told in (
        ("x y", "named owner/name"),
        ("gpt2", "named owner/name"),
        ("me/x y", "must use alphanumeric"),
        ("me/a--b", "Cannot have --"),
        ("", "named owner/name"),
    ):
        with pytest.raises(SystemExit) as stopped:
            program.main(["--repo", name])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "error: argument --repo: " in error and told in error
    assert not list(tmp_path.iterdir())


def test_without_a_connection(here: Here, hub: LoopbackHub, worker: Worker, tmp_path: Path) -> None:
    hub.stop()
    try:
        assert here.download() == 1
        assert f"{REPO}: best.pt: the Hugging Face hub cannot be reached at {hub.url}; check the conn" in here.error()
    finally:
        hub.start()
    offline = Worker(hub.url, tmp_path / "hf", offline=True)
    try:
        told = Here(offline, tmp_path)
        assert told.download() == 1 and "HF_HUB_OFFLINE forbids to connect" in told.error()
    finally:
        offline.close()


def test_a_full_disk_is_said_so_and_what_came_is_kept(
    here: Here, hub: LoopbackHub, tmp_path: Path, faulty: list[Fault]
) -> None:
    limit = len(V1_FILE) // 2
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, "-m", "niels_gpt.cli", "download"],
        cwd=tmp_path,
        env={
            **{**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"},
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the disk is full" in errors[0] and "what has come is kept" in errors[0]
    assert not here.best.exists()
    hub.ranges.clear()
    assert here.download() == 0 and here.best.read_bytes() == V1_FILE and len(hub.ranges) == 1


def test_random_faults_give_the_right_file_or_an_error(
    here: Here, faulty: list[Fault], request: pytest.FixtureRequest
) -> None:
    rng = random.Random(3)
    kinds = ("truncate", "short", "flip", "corrupt", "whole", "status")
    outcomes = {"right": 0, "refused": 0}
    for n in range(200 if request.config.getoption("--soak") else 15):
        for _ in range(rng.randint(1, 3)):
            code, where = rng.choice((401, 404, 429, 500, 503)), rng.choice(("/cdn/", "/resolve/"))
            faulty.append(Fault(rng.choice(kinds), where, code=code, at=rng.random(), times=rng.randint(1, 5)))
        if here.download() == 0:
            outcomes["right"] += 1
        else:
            outcomes["refused"] += 1
            assert f"{REPO}: best.pt" in here.error() and not here.best.exists(), (n, faulty)
            faulty.clear()
            assert here.download() == 0, (n, here.said)
        faulty.clear()
        assert here.best.read_bytes() == V1_FILE
        here.best.unlink()
    assert all(outcomes.values()), outcomes
