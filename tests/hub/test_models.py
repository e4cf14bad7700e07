"""Downloading and publishing checkpoints through the real library, against a hub on loopback: faults included."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from niels_gpt import files
from niels_gpt.chat import Conversation, build_options
from niels_gpt.checkpoint import load_checkpoint, load_model
from niels_gpt.hub.fetch import CHUNK
from niels_gpt.settings import resolve_settings
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.checkpoint.published import V1_SHAPES, V2_SHAPES, checkpoint_bytes
from tests.hub.server import Fault, LoopbackHub
from tests.hub.worker import ROOT, Worker

REPO = "nnandal/niels-gpt"
V1_FILE = checkpoint_bytes("v1", V1_SHAPES[3])
CARD = "README.md"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.publish(REPO, {"best.pt": V1_FILE, CARD: b"# hi"}, kind="model")
        yield running


@pytest.fixture(scope="module")
def worker(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    running = Worker(hub.url, tmp_path_factory.mktemp("hf_home"), offline=False)
    yield running
    running.close()


@pytest.fixture
def faulty(hub: LoopbackHub) -> Iterator[list[Fault]]:
    hub.requests.clear()
    hub.ranges.clear()
    yield hub.faults
    hub.faults.clear()


class Here:
    """A user's folder, in which the programs run."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker, self.folder = worker, folder
        self.best = folder / "checkpoints/best.pt"
        self.said = ""

    def download(self, *argv: str) -> int:
        return self._run("niels_gpt.hub.download", argv, None)

    def upload(self, *argv: str, token: str | None = "hf_right") -> int:
        return self._run("niels_gpt.hub.upload", argv, token)

    def _run(self, module: str, argv: tuple[str, ...], token: str | None) -> int:
        status: int = self._worker.ask(do="program", module=module, argv=list(argv), cwd=str(self.folder), token=token)
        self.said = self._worker.said
        return status

    def error(self) -> str:
        """The one line of error that the program ended with."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and self.said.endswith(errors[0] + "\n"), self.said
        assert "Traceback" not in self.said and len(errors[0]) < 450
        return errors[0]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def here(worker: Worker, tmp_path: Path) -> Here:
    return Here(worker, tmp_path)


# downloading


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
    assert here.download() == 0 and here.best.read_bytes() == b"mine" and "not a sound checkpoint" in here.said


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
        (("--repo", "gpt2"), "is named owner/name"),
    ):
        assert here.download(*flags) == 1 and told in here.error()
        assert here.names() == []


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


# publishing


@pytest.fixture
def mine(here: Here, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A checkpoint of this project, with the metrics of its run."""
    from niels_gpt.checkpoint import save_checkpoint, training_record
    from niels_gpt.config import NEW
    from niels_gpt.model.gpt import GPT

    torch.manual_seed(0)
    assert tiny_tokenizer.model_path is not None
    settings = resolve_settings(
        "sft",
        {
            "model": {"V": 512, "T": 32, "C": 32, "L": 2, "H": 2, "d_ff": 48},
            "tokenizer": {"model_path": str(tiny_tokenizer.model_path), "vocab_size": 512},
            "data": {"mix_pretrain": {"wikitext": 0.75, "chitchat": 0.25}, "mix_sft": {"primer": 1.0}},
        },
        run_id="run-1",
    )
    model = GPT(settings.model_cfg, NEW)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(32)[None], torch.arange(32)[None]).backward()
    optimizer.step()
    save_checkpoint(
        here.folder / "mine.pt",
        model_cfg=settings.model_cfg,
        train_cfg=training_record(settings),
        model=model,
        optimizer=optimizer,
        step=77,
        best_val_loss=2.0,
        resume={"settings": settings.settings.model_dump(mode="json"), "row": 5},
        tokenizer_model=tiny_tokenizer.model_bytes,
    )
    evals = [{"phase": "sft", "kind": "eval", "step": s, "losses": {"sft": 3.0 - s / 77}, "metric": 1} for s in (7, 77)]
    files.write_text(here.folder / "runs/run-1/metrics.jsonl", "".join(json.dumps(e) + "\n" for e in evals))
    return here.folder / "mine.pt"


def published(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    return list(hub.repositories["model", repo].commits.values())[-1]


def test_a_checkpoint_goes_up_and_comes_back(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/small", "--license", "cc-by-sa-4.0") == 0, here.said
    found = published(hub, "me/small")
    assert found["mine.pt"] == mine.read_bytes() and set(found) == {"mine.pt", CARD}
    assert (
        here.said.rstrip().splitlines()[-1]
        == f"{hub.url}/me/small/commit/{list(hub.repositories['model', 'me/small'].commits)[-1]}"
    )
    assert here.download("--repo", "me/small", "--file", "mine.pt") == 0
    loaded = load_model(here.folder / "checkpoints/mine.pt", device="cpu")
    assert loaded.step == 77 and loaded.settings is not None


def test_the_card_says_what_is_known(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    files.write_json(here.folder / "scores.json", {"wikitext": 1.234})
    flags = ("--checkpoint", "mine.pt", "--repo", "me/carded", "--scores", "scores.json", "--license", "mit")
    assert here.upload(*flags) == 0
    card = published(hub, "me/carded")[CARD].decode()
    head = card.split("---")[1]
    assert 'license: "mit"' in head and "- Salesforce/wikitext" in head and "chitchat" not in head
    for part in (
        "| pretraining | 75% | wikitext:",
        "CC BY-SA 3.0 and GFDL",
        "| fine-tuning | 100% | primer:",
        f"of {load_model(mine, device='cpu').model.num_parameters:,} parameters",
        "| T | 32 |",
        "| qk_norm | True |",
        "| steps | 77 |",
        "| wikitext | 1.234 bits per byte |",
        "| validation, sft, sft step 77 | 2.885 bits per token |",  # 2 / ln 2
        "| best validation of the run | 2.885 bits per token |",
        "niels-gpt download --repo me/carded --file mine.pt",
        f"| `mine.pt` | `{files.sha256_file(mine)}` |",
        "says false things fluently",
    ):
        assert part in card, part
    assert "step 7 |" not in card and str(here.folder) not in card


def test_publishing_again_replaces_the_card_unless_its_owner_wrote_it(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    flags = ("--checkpoint", "mine.pt", "--repo", "me/again")
    assert here.upload(*flags) == 0 and here.upload(*flags, "--license", "mit") == 0
    assert b'license: "mit"' in published(hub, "me/again")[CARD]
    hub.publish("me/again", {**published(hub, "me/again"), CARD: b"# my own words"}, kind="model")
    assert here.upload(*flags, "--weights-only") == 0 and "it stays as it is" in here.said
    found = published(hub, "me/again")
    assert found[CARD] == b"# my own words" and len(found["mine.pt"]) < mine.stat().st_size / 2
    files.write_bytes(here.folder / "slim.pt", found["mine.pt"])
    slim, whole = (load_checkpoint(p, device="cpu") for p in (here.folder / "slim.pt", mine))
    assert slim["optimizer_state"] is None and slim["resume"] is not None and "row" not in slim["resume"]
    assert all(torch.equal(slim["model_state"][name], tensor) for name, tensor in whole["model_state"].items())
    assert load_model(here.folder / "slim.pt", device="cpu").settings == load_model(mine, device="cpu").settings


def test_a_dry_run_sends_nothing(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/dry", "--dry-run", token=None) == 0
    assert hub.requests == [] and "# dry" in here.said and f"mine.pt: {mine.stat().st_size:,} bytes" in here.said


def test_published_generations_go_up_with_what_they_need(
    here: Here, hub: LoopbackHub, tiny_tokenizer: SentencePieceTokenizer, faulty: list[Fault]
) -> None:
    files.write_bytes(here.folder / "v1.pt", V1_FILE)
    sha = tiny_tokenizer.sha256
    files.write_bytes(here.folder / "v2.pt", checkpoint_bytes("v2", V2_SHAPES[0], 1, tokenizer_sha256=sha))
    files.write_bytes(here.folder / "spm.model", tiny_tokenizer.model_bytes)
    assert here.upload("--checkpoint", "v1.pt", "--repo", "me/v1") == 0, here.said
    assert here.upload("--checkpoint", "v2.pt", "--repo", "me/v2") == 0, here.said
    assert set(published(hub, "me/v1")) == {"v1.pt", CARD}
    assert set(published(hub, "me/v2")) == {"v2.pt", CARD, "spm.model"}
    card = published(hub, "me/v1")[CARD].decode()
    assert "The checkpoint does not record it." in card and "None recorded." in card and "It reads bytes" in card
    assert here.download("--repo", "me/v2", "--file", "v2.pt", "--out", "back") == 0
    assert load_model(here.folder / "back/v2.pt", device="cpu").tokenizer.sha256 == sha


def test_what_is_wrong_with_an_upload_is_one_line(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    files.write_bytes(here.folder / "cut.pt", mine.read_bytes()[:9000])
    files.write_text(here.folder / "bad.json", '{"wikitext": "good"}')
    for argv, told in (
        (("--checkpoint", "gone.pt"), "there is no checkpoint at gone.pt"),
        (("--checkpoint", "cut.pt"), "cut.pt is damaged"),
        (("--checkpoint", "mine.pt", "--scores", "bad.json"), "must be a JSON object of names and bits per byte"),
    ):
        assert here.upload(*argv, "--repo", "me/x") == 1 and told in here.error() and hub.requests == []
    flags = ("--checkpoint", "mine.pt", "--repo", "me/x")
    assert here.upload(*flags, token=None) == 1 and "hf auth login" in here.error()
    faulty.append(Fault("status", "/api/repos/create", method="POST", code=403))
    assert here.upload(*flags) == 1 and "(403)" in here.error()
    faulty.append(Fault("status", "/commit/", method="POST", code=500))
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/y") == 1
    faulty.clear()
    faulty.append(Fault("status", "/commit/", method="POST", code=500, times=2))
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/y") == 0 and "mine.pt" in published(hub, "me/y")


def test_what_arrives_otherwise_is_noticed(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/z") == 0
    whole, real = hub.publish, hub.publish

    def damaging(name: str, content: dict[str, bytes], *, kind: str = "dataset") -> str:
        return real(name, {**content, "mine.pt": content["mine.pt"][:-1] + b"x"}, kind=kind)

    hub.publish = damaging  # type: ignore[method-assign,assignment]
    try:
        assert here.upload("--checkpoint", "mine.pt", "--repo", "me/z") == 1
        assert "is not on the hub what it is here" in here.error()
    finally:
        hub.publish = whole  # type: ignore[method-assign]


def test_texts_of_ones_own_are_published_only_on_request(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    content = torch.load(mine, weights_only=True)
    content["resume"]["settings"]["data"]["mix_pretrain"] = {"roam": 0.5, "wikitext": 0.5}
    torch.save(content, here.folder / "own.pt")
    flags = ("--checkpoint", "own.pt", "--repo", "me/own")
    assert here.upload(*flags) == 1 and "learned from texts of your own (roam)" in here.error() and not hub.requests
    assert here.upload(*flags, "--private") == 0 and "me/own" in hub.private
    hub.private.clear()
    assert here.upload(*flags, "--private") == 1 and "exists and is public" in here.error()
    assert here.upload(*flags, "--share-own-text") == 0
    assert "may repeat pieces of them" in published(hub, "me/own")[CARD].decode()
