"""The published commands against a hub on loopback: `build-all`, then both phases of training on what it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from niels_gpt import files
from niels_gpt.data.types import SPLITS
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.hub import samples
from tests.hub.server import LoopbackHub
from tests.hub.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
TRAIN_TOKENS, VAL_TOKENS = 4000, 600
BUILD_ALL = (  # as documented, with budgets that the small hub can fill
    *("build-all", "--cache-dir", "data/cache", "--seed", "42", "--shard-bytes", "4096"),
    *("--fineweb-train-tokens", str(TRAIN_TOKENS), "--fineweb-val-tokens", str(VAL_TOKENS)),
    *("--roam-dir", "data/.roam-data"),
)


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        samples.publish_all(running)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A working folder as a user has it: tokenizer, notes, primer and two small configs."""
    folder = tmp_path_factory.mktemp("home")
    assert tiny_tokenizer.model_path is not None
    files.write_bytes(folder / "artifacts/tokenizer/v2/spm.model", tiny_tokenizer.model_path.read_bytes())
    files.write_bytes(folder / "artifacts/tokenizer/v2/tokenizer_meta.json", b"{}\n")
    for i, topic in enumerate(("rivers", "engines", "bread", "clouds", "chess")):
        text = " ".join(f"{topic} {n} and what I read about {topic}." for n in range(40))
        files.write_text(folder / f"data/.roam-data/{topic}.md", f"# {topic}\n\n{i} {text}\n")
    for name in ("primer.txt", "primer.jsonl"):
        files.write_bytes(folder / "data" / name, (ROOT / "data" / name).read_bytes())
    phase = {"micro_B": 4, "total_steps": 3, "warmup_steps": 1, "eval_every": 3, "eval_steps": 1, "amp": False}
    config = {
        "tokenizer": {"vocab_size": 512},
        "model": {"V": 512, "T": 32, "C": 32, "L": 1, "H": 2, "d_ff": 64},
        "training": {"pretrain": phase, "sft": phase},
    }
    files.write_json(folder / "config.json", config)
    files.write_json(
        folder / "pipeline.json", {"pretrain_config_path": "config.json", "sft_config_path": "config.json"}
    )
    return folder


@pytest.fixture(scope="module")
def built(home: Path, hub: LoopbackHub) -> str:
    """What the command says, in a process as a user starts it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hugging_face = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "niels_gpt.cache.cli", *BUILD_ALL],
        cwd=home,
        env={**inherited, **hugging_face, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in said, said[-4000:]
    return said


@pytest.fixture(scope="module")
def worker(home: Path, hub: LoopbackHub, built: str) -> Iterator[Worker]:
    """Another process, for all that comes after the first build: importing the libraries takes seconds."""
    running = Worker(hub.url, home / "hf", offline=False)
    yield running
    running.close()


def program(worker: Worker, home: Path, module: str, *arguments: str, expect: int = 0) -> str:
    status = worker.ask(do="program", module=module, argv=list(arguments), cwd=str(home))
    assert status == expect and "Traceback" not in worker.said, worker.said[-4000:]
    return worker.said


def test_the_layout_is_the_published_one(home: Path, built: str) -> None:
    cache = home / "data/cache"
    assert {p.name for p in cache.iterdir() if not p.name.startswith(".")} == {"pretrain", "sft", "tokenizer"}
    assert {p.name for p in (cache / "tokenizer").iterdir()} == {"spm.model", "tokenizer_meta.json", "meta.json"}
    folders = {p.name for p in (cache / "pretrain").iterdir() if not p.name.startswith(".")}
    assert folders == {"fineweb_edu", "wikitext", "roam"}
    assert {p.name for p in (cache / "sft").iterdir() if not p.name.startswith(".")} == {"primer", "oasst1", "dolly15k"}
    for source in folders:
        meta = files.read_json(cache / "pretrain" / source / "meta.json")
        for split in SPLITS:
            shards = sorted((cache / "pretrain" / source / split).glob("*"))
            assert [s.name for s in shards] == [f"shard_{i:05}.bin" for i in range(len(shards))]
            assert sum(s.stat().st_size for s in shards) == 2 * meta[f"{split}_tokens"]
            assert all(s.stat().st_size == 4096 for s in shards[:-1])
        assert meta["token_dtype"] == "uint16-le" and meta["seed"] == 42 and meta["shard_bytes"] == 4096
    fineweb = files.read_json(cache / "pretrain/fineweb_edu/meta.json")
    assert (fineweb["train_tokens"], fineweb["val_tokens"]) == (TRAIN_TOKENS, VAL_TOKENS)
    for source in ("primer", "oasst1", "dolly15k"):
        for split in SPLITS:
            ids, labels = (
                np.fromfile(cache / f"sft/{source}/{split}_{kind}.bin", dtype)
                for kind, dtype in (("input_ids", "<u2"), ("labels", "<i4"))
            )
            starts = np.load(cache / f"sft/{source}/{split}_idx.npy")
            assert len(ids) == len(labels) and starts[0] == 0 and (np.diff(starts) > 0).all()
            assert ((labels == -100) | (labels == ids)).all()


def test_a_second_build_keeps_everything(home: Path, worker: Worker) -> None:
    cache = home / "data/cache"

    def written() -> dict[str, tuple[bytes, int]]:
        return {
            p.as_posix(): (p.read_bytes(), p.stat().st_ino)
            for p in sorted(cache.glob("[ps]*/*/**/*"))
            if p.is_file() and not p.name.startswith(".")
        }

    before = written()
    said = program(worker, home, "niels_gpt.cache.cli", *BUILD_ALL)
    assert said.count("up to date") == 6, said
    assert written() == before
    assert "files are as written" in program(worker, home, "niels_gpt.cache.cli", "verify")
    shown = program(worker, home, "niels_gpt.cache.cli", "show")
    assert all(name in shown for name in ("pretrain/fineweb_edu", "sft/oasst1", "sft/dolly15k"))


def test_both_phases_train_from_it(home: Path, worker: Worker) -> None:
    said = program(
        worker, home, "niels_gpt.train.run", "--phase", "pipeline", "--config", "pipeline.json", "--device", "cpu"
    )
    assert "sft init from checkpoints/pretrain/best.pt" in said
    entries = [
        json.loads(line) for path in (home / "runs").glob("*/metrics.jsonl") for line in path.read_text().splitlines()
    ]
    assert {e["phase"] for e in entries if e["kind"] == "step"} == {"pretrain", "sft"}


def test_a_source_that_fails_leaves_the_others(home: Path, worker: Worker) -> None:
    config = files.read_json(home / "config.json")
    config["data"] = {"oasst1": {"dataset_id": "nobody/nothing"}, "wikitext": {"dataset_id": "nobody/nowhere"}}
    files.write_json(home / "broken.json", config)
    arguments = [a if a != "data/cache" else "data/other" for a in BUILD_ALL]
    said = program(worker, home, "niels_gpt.cache.cli", *arguments, "--config", "broken.json", expect=1)
    assert "\u2717 pretrain/wikitext failed" in said and "\u2717 sft/oasst1 failed" in said
    assert "\u2713 pretrain/fineweb_edu" in said and "\u2713 sft/dolly15k" in said
    missing = next(line for line in said.splitlines() if line.startswith("error: ") and "missing" in line)
    assert "pretrain/wikitext" in missing and "sft/oasst1" in missing and "dolly15k" not in missing
