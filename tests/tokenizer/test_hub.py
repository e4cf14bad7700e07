"""Samples, tokenizers, reports and the stream wiki from a hub on loopback, through the real libraries."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import files
from niels_gpt.tokenizer import load_tokenizer

server = pytest.importorskip("tests.hub.server", reason="needs the loopback hub of tests/hub")
samples = pytest.importorskip("tests.hub.samples", reason="needs the loopback hub of tests/hub")

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = """
import json
from niels_gpt.streams import StreamBuildConfig, build_sources
from niels_gpt.tokenizer.report import main as report
from niels_gpt.tokenizer.sample import sample_fineweb, sample_wikitext
from niels_gpt.tokenizer.train_cli import main as train

wiki = ("wiki",)
status = [
    sample_fineweb(["--out", "fineweb.txt", "--bytes", "2000"]),
    sample_wikitext(["--out", "wikitext.txt", "--bytes", "3000"]),
    *(
        train(["--include_wikitext", "--wikitext_limit_bytes", "4000", "--fineweb_bytes", "5000", "--vocab_size", "320",
               "--out_dir", out])
        for out in ("one", "two")
    ),
    report(["--tokenizer", "one/spm.model", "--wikitext", "--wikitext-bytes", "900", "--fineweb-file", "fineweb.txt"]),
    sample_fineweb(["--out", "gone.txt", "--bytes", "10", "--dataset", "nobody/nothing"]),
]
for _ in range(2):
    train_bytes, val_bytes = build_sources(StreamBuildConfig(enabled_sources=wiki, required_sources=wiki))
print("STATUS", json.dumps(status + [len(train_bytes["wiki"]), len(val_bytes["wiki"])]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One process that does it all, since importing the libraries takes seconds."""
    folder = tmp_path_factory.mktemp("sampled")
    with server.LoopbackHub() as hub:
        samples.publish_all(hub)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", EVERYTHING],
            cwd=folder,
            env={**inherited, **where, **quiet},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def status(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.split("STATUS ")[1])


def test_all_went_as_it_should(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = ran
    assert status(done)[:6] == [0, 0, 0, 0, 0, 1]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "nobody/nothing" in errors[0] and "Traceback" not in done.stderr


def test_samples(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = ran
    fineweb, wikitext = ((folder / name).read_bytes() for name in ("fineweb.txt", "wikitext.txt"))
    lines = fineweb.decode().splitlines(keepends=True)
    assert len(fineweb) >= 2000 > len("".join(lines[:-1]).encode())
    assert all(line.startswith("Page ") for line in lines)
    assert len(wikitext) == 3000 and b"\n\n = Article " in wikitext
    for content in (fineweb, wikitext):
        assert f"sha256 {hashlib.sha256(content).hexdigest()}" in done.stdout
    assert not (folder / "gone.txt").exists()


def test_a_tokenizer_of_the_hub(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = ran
    wikitext, fineweb = files.read_json(folder / "one/tokenizer_meta.json")["dataset_sources"]
    assert (wikitext["source"], wikitext["limit_bytes"]) == ("wikitext", 4000)
    assert 4000 <= wikitext["bytes"] < 4500
    assert fineweb["dataset"] == "HuggingFaceFW/fineweb-edu" and fineweb["name"] == "CC-MAIN-2024-10"
    assert fineweb["limit_bytes"] == 5000 <= fineweb["bytes"] < 5500
    assert load_tokenizer(folder / "one/spm.model").vocab_size == 320
    for name in ("spm.model", "spm.vocab", "tokenizer_meta.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert "[wikitext] tokens=" in done.stdout and "[fineweb.txt] tokens=" in done.stdout


def test_the_stream_wiki(ran: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = ran
    meta = files.read_json(folder / "data/cache/streams/wiki_train.meta.json")
    stream = (folder / "data/cache/streams/wiki_train.bin").read_bytes()
    assert (meta["source"], meta["split"], meta["sep"], meta["n_bytes"]) == ("wiki", "train", "\n\n", len(stream))
    assert stream.startswith(b" = Article ") and len(stream) == status(done)[6] > 513
    rows = [row["text"] for n, seed in ((300, 2), (150, 3)) for row in samples.wikitext_rows(n, seed)]
    assert stream.decode() == "\n\n".join(text for text in rows if text.strip())
    assert meta["n_docs"] == sum(bool(text.strip()) for text in rows)
