"""Builds that are killed, interrupted or repeated: the same bytes in the end, and nothing left beside them."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.cache import writing
from niels_gpt.cache.format import open_pretrain
from niels_gpt.data.registry import SOURCES
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.cache import slow_build
from tests.cache.slow_build import build

KINDS = ("folder", "stream")
PROCESSES = multiprocessing.get_context("forkserver")  # which imports everything once, for all that are killed
PROCESSES.set_forkserver_preload(["tests.cache.slow_build"])


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`slow_build.build` makes blocks and commits small for its process; here they are put back."""
    for module, name in (
        (slow_build.encode, "BATCH_DOCUMENTS"),
        (slow_build.encode, "INLINE_BATCHES"),
        (writing, "COMMIT_TOKENS"),
        (slow_build.words, "MEMORY_TOKENS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    before = dict(SOURCES)
    yield
    SOURCES.clear()
    SOURCES.update(before)


@pytest.fixture(scope="module")
def model(tiny_tokenizer: SentencePieceTokenizer) -> Path:
    assert tiny_tokenizer.model_path is not None
    return tiny_tokenizer.model_path


def contents(root: Path) -> dict[str, bytes]:
    """Every file under a folder but the note that says what was verified."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".verified"
    }


class Stop(BaseException):
    """Not an error: as Ctrl-C or a kill."""


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> list[dict[str, int]]:
    """Interrupt a build right after this many journals were written; returns the list of what each had consumed."""
    seen: list[dict[str, int]] = []
    real = writing.write_journal

    def write(folder: Path, key: str, state: dict[str, Any]) -> None:
        real(folder, key, state)
        seen.append(dict(state["consumed"]))
        if len(seen) == commits:
            raise Stop

    monkeypatch.setattr(writing, "write_journal", write)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_build_goes_on_from_every_commit(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "straight", model, kind)
    expected = contents(tmp_path / "straight")
    assert (
        len([name for name in expected if "shard_" in name]) >= 6
        and len(expected) == len(json.loads(expected[f"{kind}/meta.json"])["files"]) + 2
    )
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            seen = stop_after(patch, 2)
            try:
                build(tmp_path / "stopped", model, kind)
            except Stop:
                stops += 1
                folder = tmp_path / "stopped" / f".{kind}.new"
                (folder / "train").mkdir(exist_ok=True)
                with open(folder / "train" / "shard_00099.bin", "wb") as later:  # written after the journal
                    later.write(b"rubbish")
                for name in json.loads((folder / "journal.json").read_text())["open"]:
                    with open(folder / name, "ab") as file:
                        file.write(b"tail that was never committed")
                continue
        break
    assert stops >= 4 and len(seen) == 1
    assert contents(tmp_path / "stopped") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_finished_work_is_not_repeated(tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        seen = stop_after(patch, 8)
        build(tmp_path, model, kind)
    encoded = 0
    real = slow_build.encode.Encoder._submit

    def count(self: Any, batch: Any, n: int) -> Any:
        nonlocal encoded
        encoded += len(batch.texts)
        return real(self, batch, n)

    monkeypatch.setattr(slow_build.encode.Encoder, "_submit", count)
    meta = build(tmp_path, model, kind)
    before = sum(seen[-1].values())
    total = sum(meta["documents"].values())
    assert before > 100 and encoded <= total - before + 2 * 16  # a stream reads at most a block more than it needs


def test_damaged_or_other_work_is_not_gone_on_with(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "straight", model, "folder")
    for damage in ("finished", "short", "journal", "other"):
        root = tmp_path / damage
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(patch, 4)
            build(root, model, "folder", *([500] if damage == "other" else []))
        folder = root / ".folder.new"
        state = json.loads((folder / "journal.json").read_text())
        if damage == "finished":
            path = folder / next(iter(state["files"]))
            path.write_bytes(b"\0" + path.read_bytes()[1:])
        elif damage == "short":
            (folder / next(name for name, size in state["open"].items() if size)).write_bytes(b"")
        elif damage == "journal":
            (folder / "journal.json").write_text('{"key":')
        build(root, model, "folder")
        assert contents(root) == contents(tmp_path / "straight"), damage


def test_an_error_in_the_source_leaves_the_old_cache_and_no_rest(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, model, "folder", 100)
    before = contents(tmp_path)
    monkeypatch.setattr(writing.PretrainWriter, "commit", lambda self, **_: (_ for _ in ()).throw(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        build(tmp_path, model, "folder")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, model: Path, kind: str) -> None:
    results = []
    for workers in (1, 3):
        build(tmp_path / str(workers), model, kind, 300, workers)
        results.append(contents(tmp_path / str(workers)))
    assert results[0] == results[1]


def kill_builds(root: Path, model: Path, kind: str, kills: int, seed: int) -> int:
    """Kill builds at random moments until that many died, then finish; returns how many left a journal."""
    draw = random.Random(seed)
    died = journals = 0
    new = root / f".{kind}.new"
    arguments = (root, model, kind, 600, 2)
    while died < kills:
        process = PROCESSES.Process(target=build, args=arguments)
        process.start()
        while process.is_alive() and not new.is_dir():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            died += 1
            journals += (new / "journal.json").is_file()
        elif (root / kind).is_dir():  # it was done before: begin another
            shutil.rmtree(root / kind)
    process = PROCESSES.Process(target=build, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    return journals


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_random_moments(tmp_path: Path, model: Path, kind: str) -> None:
    build(tmp_path / "straight", model, kind)
    kill_builds(tmp_path / "killed", model, kind, kills=6, seed=5)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_a_hundred_times(tmp_path: Path, model: Path, kind: str) -> None:
    build(tmp_path / "straight", model, kind)
    journals = 0
    for round_ in range(10):
        journals += kill_builds(tmp_path / "killed", model, kind, kills=10, seed=100 + round_)
        assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
        shutil.rmtree(tmp_path / "killed")
    assert journals > 10  # the kills hit builds that had something to lose


def test_a_cache_opens_while_it_is_built_again(
    tmp_path: Path, model: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    build(tmp_path, model, "folder", 100)
    options: dict[str, Any] = {"tokenizer_sha256": tiny_tokenizer.sha256, "vocab_size": 512}
    old = open_pretrain(tmp_path, "folder", "train", **options).num_tokens
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 3)
        build(tmp_path, model, "folder")
    assert open_pretrain(tmp_path, "folder", "train", **options).num_tokens == old
    build(tmp_path, model, "folder")
    assert open_pretrain(tmp_path, "folder", "train", **options).num_tokens > old
