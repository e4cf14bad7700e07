"""Cache formats: reproduced to the bit, and every damage refused by name."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from niels_gpt.cache import integrity
from niels_gpt.cache.format import open_pretrain, open_sft
from niels_gpt.cache.writing import writing_pretrain, writing_sft
from niels_gpt.files import sha256_file
from tests.cache.samples import META, SHA, SPECIALS, add_document, build_pretrain_cache, build_sft_cache, data_files
from tests.reference import BUNDLE, needs_bundle


def open_both(root: Path, **options: Any) -> None:
    for split in ("train", "val"):
        open_pretrain(root, "notes", split, tokenizer_sha256=SHA, vocab_size=512, **options)
        open_sft(root, "talk", split, tokenizer_sha256=SHA, vocab_size=512, **options)


# What is written


def test_shards_hold_documents_end_to_end_and_windows_stay_inside_them(root: Path) -> None:
    shards = sorted((root / "notes" / "train").iterdir())
    assert [path.name for path in shards] == [f"shard_{i:05d}.bin" for i in range(5)]
    assert [path.stat().st_size for path in shards] == [128, 128, 128, 128, 108]
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in shards])
    assert len(tokens) == 10 * 31 and (tokens[30::31] == 6).all()
    stream = open_pretrain(root, "notes", "train", tokenizer_sha256=SHA, vocab_size=512)
    assert [len(array) for array in stream.arrays] == [64, 64, 64, 64, 54]
    assert stream.windows(60) == [4, 4, 4, 4, 0]  # the last shard is too short to be drawn from
    with pytest.raises(ValueError, match=r"T\+1 = 65.*lower T"):
        stream.windows(64)


def test_meta_counts_documents_bytes_and_files(root: Path) -> None:
    meta = json.loads((root / "notes" / "meta.json").read_text())
    assert meta["train_tokens"] == 310 and meta["val_tokens"] == 51
    assert meta["documents"] == {"train": 10, "val": 1} and meta["bytes"] == {"train": 300, "val": 50}
    assert meta["token_dtype"] == "uint16-le" and meta["document_separator"] == "eot" and meta["shard_bytes"] == 128
    for name, entry in meta["files"].items():
        path = root / "notes" / name
        assert entry == {"size": path.stat().st_size, "sha256": sha256_file(path)}
    meta = json.loads((root / "talk" / "meta.json").read_text())
    assert meta["splits"]["val"] == {"num_examples": 3, "num_tokens": 27, "num_label_tokens": 15}
    assert (meta["train_examples"], meta["val_examples"], meta["label_dtype"]) == (9, 3, "int32-le")


def test_a_full_last_shard_has_no_empty_shard_after_it(tmp_path: Path) -> None:
    with writing_pretrain(tmp_path / "x", dict(META), vocab_size=512, separator=None, shard_bytes=20) as writer:
        add_document(writer, "train", range(20))
    assert sorted(path.name for path in (tmp_path / "x" / "train").iterdir()) == ["shard_00000.bin", "shard_00001.bin"]
    assert [path.stat().st_size for path in (tmp_path / "x" / "val").iterdir()] == [0]
    assert open_pretrain(tmp_path, "x", "val", tokenizer_sha256=SHA, vocab_size=512).num_tokens == 0


def test_examples_come_back_as_they_were_written(root: Path) -> None:
    examples = open_sft(root, "talk", "train", tokenizer_sha256=SHA, vocab_size=512)
    assert len(examples) == 9
    ids, labels = examples.example(8)
    assert ids.tolist() == [4, 111, 6, 5, *range(200, 214), 6] and ids.dtype == np.int64
    assert labels.tolist() == [-100] * 4 + ids.tolist()[4:]
    with pytest.raises(IndexError, match="9 conversations"):
        examples.example(9)


def test_equal_builds_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_pretrain_cache(tmp_path / name)
        build_sft_cache(tmp_path / name)
    one, two = ({p.relative_to(tmp_path / n): p.read_bytes() for p in data_files(tmp_path / n)} for n in "ab")
    assert one == two


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65536 pieces does not fit"):
        build = writing_pretrain(tmp_path / "x", {}, vocab_size=65536, separator=None, shard_bytes=128)
        build.__enter__()
    with (
        pytest.raises(ValueError, match="token id 512 is outside the vocabulary of 512"),
        writing_pretrain(tmp_path / "x", {}, vocab_size=512, separator=None, shard_bytes=128) as writer,
    ):
        add_document(writer, "train", [5, 512])
    for ids in ([5, 512], [5, -1], [70000]):
        with (
            pytest.raises(ValueError, match=f"token id {ids[-1]} is outside the vocabulary of 512"),
            writing_sft(tmp_path / "x", {}, vocab_size=512) as chats,
        ):
            chats.add("train", ids, ids, 1)
    assert list(tmp_path.iterdir()) == []


# What is refused


def test_every_flipped_bit_is_refused_naming_the_file(root: Path) -> None:
    generator = random.Random(1)
    for path in data_files(root):
        good = path.read_bytes()
        for _ in range(25):
            position, bit = generator.randrange(len(good)), generator.randrange(8)
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="damaged") as caught:
                open_both(root)
            text = str(caught.value)
            assert str(path) in text
            assert path.suffix == ".sha256" or len(re.findall(r"\b[0-9a-f]{64}\b", text)) == 2, text
            assert "python -m niels_gpt.cache.cli build" in text
        path.write_bytes(good)
    open_both(root)


def test_every_truncation_and_extension_is_refused_naming_the_file(root: Path) -> None:
    generator = random.Random(2)
    for path in data_files(root):
        good = path.read_bytes()
        for size in {0, len(good) - 1, *(generator.randrange(len(good)) for _ in range(6))}:
            path.write_bytes(good[:size])
            with pytest.raises(ValueError, match="damaged") as caught:
                open_both(root)
            assert str(path) in str(caught.value)
        path.write_bytes(good + b"\0\0")
        with pytest.raises(ValueError, match="damaged"):
            open_both(root)
        path.write_bytes(good)


def test_every_missing_file_is_named(root: Path) -> None:
    for path in data_files(root):
        good = path.read_bytes()
        path.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=path.name):
            open_both(root)
        path.write_bytes(good)
    with pytest.raises(FileNotFoundError, match=r"no cache at .*nowhere; build it with: .*cache.cli build nowhere"):
        open_pretrain(root, "nowhere", "train", tokenizer_sha256=SHA, vocab_size=512)


def test_a_map_is_never_made_of_a_short_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(root / "notes" / "train" / "shard_00001.bin", 64)
    monkeypatch.setattr(np, "memmap", lambda *a, **k: pytest.fail("mapped before its size was checked"))
    with pytest.raises(ValueError, match=r"shard_00001.bin is damaged: 64 bytes"):
        open_pretrain(root, "notes", "train", tokenizer_sha256=SHA, vocab_size=512)


def test_a_marker_does_not_vouch_for_a_short_file(root: Path) -> None:
    age(root)
    open_both(root)
    shard = root / "notes" / "train" / "shard_00000.bin"
    os.truncate(shard, 64)
    marker = root / "notes" / ".verified"
    known = json.loads(marker.read_text())
    known["train/shard_00000.bin"] = [64, shard.stat().st_mtime_ns]
    marker.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"shard_00000\.bin is damaged: 64 bytes"):
        open_both(root)


def age(root: Path) -> None:
    for path in data_files(root):
        os.utime(path, ns=(10**18, 10**18))


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    original = integrity.sha256_file
    monkeypatch.setattr(integrity, "sha256_file", lambda path: hashed.append(Path(path).name) or original(path))
    return hashed


def test_content_is_hashed_once_and_again_after_a_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root)
    hashed = count_hashes(monkeypatch)
    open_both(root)
    assert len(hashed) == 6 + 6
    hashed.clear()
    open_both(root)
    assert hashed == []
    shard = root / "notes" / "train" / "shard_00000.bin"
    os.utime(shard, ns=(10**18 + 1, 10**18 + 1))
    open_both(root)
    assert hashed.count("shard_00000.bin") == 2 and "train_idx.npy" not in hashed
    hashed.clear()
    open_both(root)
    assert hashed == []
    open_both(root, verify=True)
    assert len(hashed) == 2 * (6 + 6)


def test_verify_finds_damage_that_left_size_and_time_alone(root: Path) -> None:
    age(root)
    open_both(root)
    shard = root / "notes" / "val" / "shard_00000.bin"
    content = bytearray(shard.read_bytes())
    content[4] ^= 1
    shard.write_bytes(content)
    age(root)
    open_both(root)
    with pytest.raises(ValueError, match="damaged"):
        open_both(root, verify=True)


def test_a_file_changed_a_moment_ago_is_not_taken_as_verified(root: Path) -> None:
    open_both(root)
    assert not (root / "notes" / ".verified").exists()


def test_another_tokenizer_is_refused(root: Path) -> None:
    other = "cd" * 32
    for opener, name in ((open_pretrain, "notes"), (open_sft, "talk")):
        with pytest.raises(ValueError, match=rf"tokenizer hash mismatch.*{SHA}.*{other}.*cache.cli build {name}"):
            opener(root, name, "train", tokenizer_sha256=other, vocab_size=512)
        with pytest.raises(ValueError, match="tokenizer hash mismatch"):
            opener(root, name, "train", tokenizer_sha256=None, vocab_size=512)
        permuted = {**SPECIALS, "sys": 4, "usr": 3}
        with pytest.raises(ValueError, match="special token ids mismatch"):
            opener(root, name, "train", tokenizer_sha256=SHA, vocab_size=512, special_token_ids=permuted)
        with pytest.raises(ValueError, match="512 pieces, but the model has V=511"):
            opener(root, name, "train", tokenizer_sha256=SHA, vocab_size=511)


def test_a_missing_index_is_an_error_unless_allowed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "talk" / "train_idx.npy").unlink()
    options: dict[str, Any] = {"tokenizer_sha256": SHA, "vocab_size": 512}
    with pytest.raises(FileNotFoundError, match=r"train_idx\.npy"):
        open_sft(root, "talk", "train", **options)
    examples = open_sft(root, "talk", "train", allow_missing_idx=True, **options)
    assert len(examples) == 1 and len(examples.example(0)[0]) == len(examples.ids)
    assert "train_idx.npy is missing" in capsys.readouterr().out


# Published caches, which list no files


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The caches of this module without what only we write."""
    for path in (build_pretrain_cache(tmp_path), build_sft_cache(tmp_path)):
        meta = json.loads((path / "meta.json").read_text())
        for key in ("files", "documents", "bytes", "document_separator"):
            meta.pop(key, None)
        (path / "meta.json").write_text(json.dumps(meta))
        (path / "meta.json.sha256").unlink()
    return tmp_path


def test_published_caches_open(published: Path) -> None:
    open_both(published)
    talk = published / "talk"
    before = open_sft(published, "talk", "train", tokenizer_sha256=SHA, vocab_size=512).ids.tolist()
    (talk / "train_input_ids.bin").rename(talk / "train_tokens.bin")
    open_both(published)
    assert before == open_sft(published, "talk", "train", tokenizer_sha256=SHA, vocab_size=512).ids.tolist() != []


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("notes/train/shard_00001.bin", lambda b: b[:-1], "whole number"),
        ("notes/train/shard_00001.bin", lambda b: b[:-2], "309 tokens, 310 were written"),
        ("notes/train/shard_00001.bin", lambda b: b"\xff\xff" + b[2:], "to 65535"),
        ("notes/val/shard_00000.bin", lambda b: b"", "0 tokens, 51 were written"),
        ("talk/train_labels.bin", lambda b: b[:-4], "labels"),
        ("talk/train_labels.bin", lambda b: b"\xff\xff\xff\x7f" + b[4:], "holds ids"),
        ("talk/train_input_ids.bin", lambda b: b[:-1], "whole number"),
        ("talk/val_idx.npy", lambda b: b[:-8], "cannot be read"),
        ("talk/val_idx.npy", lambda b: b[:-8] + b"\xff" * 8, "rising offsets"),
        ("talk/val_idx.npy", lambda b: b"", "cannot be read"),
    ],
)
def test_published_caches_are_checked_as_far_as_they_can_be(
    published: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = published / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        open_both(published)
    assert path.name in str(caught.value) or path.parent.name in str(caught.value)


def test_a_stub_is_a_stream_of_no_tokens(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "roam" / split).mkdir(parents=True)
        (tmp_path / "roam" / split / "shard_00000.bin").touch()
    meta = {**META, "vocab_size": 512, "stub": True, "train_tokens": 0, "val_tokens": 0}
    (tmp_path / "roam" / "meta.json").write_text(json.dumps(meta))
    assert open_pretrain(tmp_path, "roam", "train", tokenizer_sha256=SHA, vocab_size=512).num_tokens == 0


def test_byte_streams_of_the_first_generation_open_for_byte_models_only(tmp_path: Path) -> None:
    (tmp_path / "wiki_train.bin").write_bytes("naïve".encode())
    stream = open_pretrain(tmp_path, "wiki", "train", tokenizer_sha256=None, vocab_size=256)
    assert stream.window(0, 5).tolist() == list("naïve".encode())
    with pytest.raises(ValueError, match=r"wiki_train.bin holds bytes.*cache.cli build wiki"):
        open_pretrain(tmp_path, "wiki", "train", tokenizer_sha256=SHA, vocab_size=512)


@needs_bundle
@pytest.mark.parametrize("source", ["wikitext", "fineweb_edu"])
def test_reference_pretraining_caches_open(source: str) -> None:
    meta = json.loads((BUNDLE / "v2/cache/pretrain" / source / "meta.json").read_text())
    for split in ("train", "val"):
        stream = open_pretrain(
            BUNDLE / "v2/cache/pretrain",
            source,
            split,
            tokenizer_sha256=meta["tokenizer_sha256"],
            vocab_size=512,
            special_token_ids=SPECIALS,
        )
        assert stream.num_tokens == meta[f"{split}_tokens"]
