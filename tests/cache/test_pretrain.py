"""Pretraining caches: built from sources, kept when up to date, reproduced to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from niels_gpt.cache import encode
from niels_gpt.cache.building import shuffled
from niels_gpt.cache.format import open_pretrain
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.data.registry import SOURCES, Source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.cache.samples import build, settings_for, write_notes
from tests.reference import BUNDLE, needs_bundle


def tokens(settings: Settings, tokenizer: Any, source: str, split: str) -> list[int]:
    root = settings.data.caches.pretrain_token_cache
    stream = open_pretrain(
        root,
        source,
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=512,
        special_token_ids=tokenizer.special_token_ids(),
    )
    return np.concatenate([*stream.arrays, np.empty(0, np.uint16)]).tolist()


def test_documents_are_cached_with_the_end_id_after_each(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    write_notes(tmp_path / "text")
    settings = settings_for(tmp_path)
    counts: list[tuple[str, int]] = []
    meta = build(
        settings,
        tiny_tokenizer,
        "text",
        caches={"shard_bytes": 1000},
        progress=lambda done: counts.append((done.what, done.documents)),
    )
    assert sum(meta["documents"].values()) == 20 and meta["documents"]["val"] > 0
    assert counts[-1] == ("train", meta["documents"]["train"])
    texts: dict[str, str] = {}
    for split in ("train", "val"):
        ids = tokens(settings, tiny_tokenizer, "text", split)
        assert len(ids) == meta[f"{split}_tokens"] and ids[-1] == 6 and ids.count(6) == meta["documents"][split]
        texts[split] = tiny_tokenizer.decode(ids)
        text_bytes = sum(len(tiny_tokenizer.token_bytes(i)) for i in ids)
        assert text_bytes == meta["bytes"][split]  # what bits per byte divides by
    assert sorted(texts["train"].split("# ")[1:] + texts["val"].split("# ")[1:]) == sorted(
        path.read_text(encoding="utf-8").strip()[2:] for path in (tmp_path / "text").rglob("*.md")
    )


def test_a_byte_tokenizer_separates_documents_by_a_blank_line(tmp_path: Path) -> None:
    write_notes(tmp_path / "text")
    settings = settings_for(tmp_path)
    meta = build(settings, ByteTokenizer(), "text")
    text = bytes(tokens(settings, ByteTokenizer(), "text", "train")).decode()
    assert len(text.split("\n\n# ")) == meta["documents"]["train"] and meta["document_separator"] is None
    assert meta["tokenizer_sha256"] is None and meta["vocab_size"] == 256


def test_a_cache_is_built_again_only_when_something_changed(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    write_notes(tmp_path / "text")
    settings = settings_for(tmp_path)
    folder = tmp_path / "cache" / "pretrain" / "text"
    first = build(settings, tiny_tokenizer, "text")
    inode = (folder / "meta.json").stat().st_ino
    again = build(settings, tiny_tokenizer, "text")
    assert again.pop("reused") and again == first and (folder / "meta.json").stat().st_ino == inode
    assert "reused" not in (folder / "meta.json").read_text()

    assert "reused" not in build(settings, tiny_tokenizer, "text", caches={"shard_bytes": 512})
    assert "reused" not in build(
        settings_for(tmp_path, text={"split_seed": 7, "root_dir": str(tmp_path / "text")}), tiny_tokenizer, "text"
    )
    (tmp_path / "text" / "new.txt").write_text("one more")
    assert sum(build(settings, tiny_tokenizer, "text")["documents"].values()) == 21
    assert build(settings, tiny_tokenizer, "text")["reused"]
    assert "reused" not in build(settings, ByteTokenizer(), "text")
    build(settings, tiny_tokenizer, "text")
    other = copy.copy(tiny_tokenizer)
    other.sha256 = "0" * 64
    assert "reused" not in build(settings, other, "text")
    build(settings, tiny_tokenizer, "text")
    shard = folder / "train" / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert "reused" not in build(settings, tiny_tokenizer, "text")
    assert build(settings, tiny_tokenizer, "text")["reused"]


@pytest.mark.parametrize("killed", ["between the renames", "while deleting"])
def test_a_killed_build_of_the_same_cache_is_cleaned_up_after(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, killed: str
) -> None:
    settings = settings_for(tmp_path)
    build(settings, tiny_tokenizer, "primer")
    root = tmp_path / "cache" / "pretrain"
    new, old = root / ".primer.new", root / ".primer.old"
    shutil.copytree(root / "primer", old)
    if killed == "between the renames":
        (root / "primer").rename(new)
    assert build(settings, tiny_tokenizer, "primer")["reused"]
    assert [path.name for path in root.iterdir()] == ["primer"]


@pytest.mark.parametrize("literal", SPECIAL_TOKENS.values())
def test_text_that_poses_as_a_sentinel_is_an_error(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, literal: str
) -> None:
    write_notes(tmp_path / "text", 3)
    (tmp_path / "text" / "bad.txt").write_text(f"hello {literal} there")
    with pytest.raises(ValueError, match="special token literal"):
        build(settings_for(tmp_path), tiny_tokenizer, "text")
    assert not (tmp_path / "cache" / "pretrain" / "text").exists()


def test_wrong_sources_are_refused(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    settings = settings_for(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*text; .* set data\.text\.root_dir"):
        build(settings, tiny_tokenizer, "text")
    with pytest.raises(OSError, match="wikitext: it is not in the Hugging Face cache"):
        build(settings, tiny_tokenizer, "wiki")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="text has no text to train on"):
        build(settings, tiny_tokenizer, "text")


# The published caches, to the bit


OURS = ("files", "documents", "bytes", "document_separator", "source_fingerprint", "build_version")


@needs_bundle
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("source", ["wikitext", "fineweb_edu"])
def test_reference_caches_are_reproduced_to_the_bit(
    tmp_path: Path, source: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = BUNDLE / "v2/cache/pretrain" / source
    wanted = json.loads((expected / "meta.json").read_text())
    texts = json.loads((BUNDLE / "v2/corpus/toy_docs.json").read_text())
    about = {key: wanted[key] for key in ("dataset_name", "dataset_config", "split_rule")}
    about |= {key: wanted[key] for key in wanted if key.startswith("dataset_revision")}
    published = Source(
        "made",
        lambda settings, phase: {**about, "streaming": wanted["streaming"]},
        stream=lambda settings: (Document(text, "made") for text in texts),
        ends_documents=False,
    )
    monkeypatch.setitem(SOURCES, "made", published)
    buffer = wanted["shuffle_buffer"] or 1  # of 1: the order of the source
    caches = {"seed": wanted["seed"], "shard_bytes": wanted["shard_bytes"]}
    reproducibility = {"dataset_shuffle_buffer_size": buffer}
    settings = validate_overrides({"data": {"caches": caches}, "reproducibility": reproducibility})
    meta = build_pretrain(
        settings,
        load_tokenizer(BUNDLE / "v2/tokenizer/spm.model"),
        "made",
        root=tmp_path,
        train_tokens=wanted["train_tokens_target"],
        val_tokens=wanted["val_tokens_target"],
        workers=workers,
    )
    ours = {key: value for key, value in meta.items() if key not in OURS}
    assert {**ours, "shuffle_buffer": wanted["shuffle_buffer"]} == wanted
    written = sorted(path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*.bin"))
    assert written == sorted(path.relative_to(expected) for path in expected.rglob("*.bin"))
    for name in written:
        assert (tmp_path / "made" / name).read_bytes() == (expected / name).read_bytes()


def test_the_shuffle_buffer_draws_as_published() -> None:
    """Filled to its size, then for every text a random one of it; what is left is drawn the same way."""
    texts = [f"{i}" for i in range(12)]
    drawn = [2, 4, 0, 5, 6, 8, 1, 3, 10, 11, 7, 9]  # by torch.randint of the numbers in the buffer
    assert list(shuffled(texts, 4, seed=42)) == [texts[i] for i in drawn]
    assert list(shuffled(texts, 1, seed=42)) == texts
    read: list[str] = []
    one_by_one = shuffled((read.append(text) or text for text in texts), 4, seed=42)
    assert (next(one_by_one), len(read)) == ("2", 4) and (next(one_by_one), len(read)) == ("4", 5)
    assert sorted(shuffled(texts, 100, seed=1), key=int) == texts != list(shuffled(texts, 100, seed=1))


# Streams and reuse


def stream_source(texts: list[str], name: str = "made") -> Source:
    about = {"dataset_name": name, "split_rule": None}
    return Source(name, lambda *_: about, stream=lambda settings: (Document(text, name) for text in texts))


def test_a_stream_fills_val_then_train_and_reads_no_further(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def stream(settings: Settings) -> Iterator[Document]:
        nonlocal read
        for read in range(1, 10**9):
            yield Document(f"text {read} of an endless stream", "made")

    monkeypatch.setitem(SOURCES, "made", Source("made", lambda *_: {}, stream=stream))
    settings = validate_overrides({"reproducibility": {"dataset_shuffle_buffer_size": 50}})
    meta = build_pretrain(settings, tiny_tokenizer, "made", root=tmp_path, train_tokens=30_000, val_tokens=1001)
    assert (meta["train_tokens"], meta["val_tokens"]) == (30_000, 1001) and meta["streaming"]
    assert meta["shuffle_buffer"] == 50 and read < 20_000
    assert not list(tmp_path.rglob("*_documents.bin"))
    again = build_pretrain(settings, tiny_tokenizer, "made", root=tmp_path, train_tokens=30_000, val_tokens=1001)
    assert again["reused"]
    with pytest.raises(ValueError, match="at least 1 token to train on"):
        build_pretrain(settings, tiny_tokenizer, "made", root=tmp_path, train_tokens=0)


def test_a_stream_that_ends_early_gives_what_it_has(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {i}" for i in range(100)]
    monkeypatch.setitem(SOURCES, "made", stream_source(texts))
    options = {"root": tmp_path, "val_tokens": 7}
    meta = build_pretrain(Settings(), tiny_tokenizer, "made", **options)
    total = sum(len(tiny_tokenizer.encode(text)) + 1 for text in texts)
    assert (meta["val_tokens"], meta["train_tokens"]) == (7, total - 7)
    assert sum(meta["bytes"].values()) <= sum(map(len, texts))
    with pytest.raises(ValueError, match="no text to train on"):
        build_pretrain(Settings(), tiny_tokenizer, "made", root=tmp_path / "x", val_tokens=10**6)


def test_a_new_file_is_the_only_one_that_is_tokenized(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notes(tmp_path / "roam")  # whose permutation moves every file when one is added
    settings = settings_for(tmp_path)
    build(settings, tiny_tokenizer, "roam", caches={"shard_bytes": 1000})
    (tmp_path / "roam" / "new.md").write_text("one more note")
    (tmp_path / "roam" / "part 0" / "note 00.md").write_text("changed")
    encoded: list[str] = []
    real = encode.Encoder._submit
    monkeypatch.setattr(
        encode.Encoder, "_submit", lambda self, batch, n: encoded.extend(batch.texts) or real(self, batch, n)
    )
    meta = build(settings, tiny_tokenizer, "roam", caches={"shard_bytes": 600})
    assert sorted(encoded) == ["changed", "one more note"] and meta.pop("reused_documents") == 19
    fresh = settings_for(tmp_path, caches={"pretrain_token_cache": str(tmp_path / "fresh")})
    assert build(fresh, tiny_tokenizer, "roam", caches={"shard_bytes": 600}) == meta
    for name in meta["files"]:
        assert (tmp_path / "cache/pretrain/roam" / name).read_bytes() == (tmp_path / "fresh/roam" / name).read_bytes()


def test_a_damaged_cache_is_not_reused(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    write_notes(tmp_path / "text")
    settings = settings_for(tmp_path)
    build(settings, tiny_tokenizer, "text")
    index = tmp_path / "cache/pretrain/text/train_documents.bin"
    index.write_bytes(bytes([index.read_bytes()[0] ^ 1]) + index.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"train_documents\.bin is damaged"):
        tokens(settings, tiny_tokenizer, "text", "train")
    assert "reused_documents" not in build(settings, tiny_tokenizer, "text")


@needs_bundle
def test_reference_windows_are_drawn_from_the_opened_shards() -> None:
    vectors = np.load(BUNDLE / "v2/batches/pretrain_dataset_fineweb_edu_seed42_B4_T32.npz")
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    stream = open_pretrain(
        BUNDLE / "v2/cache/pretrain", "fineweb_edu", "train", tokenizer_sha256=tokenizer.sha256, vocab_size=512
    )
    windows = {tuple(stream.window(i, 32, array=a)) for a, n in enumerate(stream.windows(32)) for i in range(n)}
    for x, y in zip(vectors["x"], vectors["y"], strict=True):
        assert (*x, y[-1]) in windows
    generator = torch.Generator().manual_seed(42)
    assert tuple(stream.draw(32, generator)) in windows
