"""Sources by name, and those that read folders and the primer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from niels_gpt.data import primer_source, roam, text
from niels_gpt.data.registry import SOURCES, get_source, is_optional
from niels_gpt.settings import PRETRAIN_SOURCES, SFT_SOURCES, Settings, validate_overrides
from niels_gpt.settings.legacy import RENAMED_SOURCES
from tests.reference import BUNDLE, needs_bundle


def settings_for(**data: Any) -> Settings:
    return validate_overrides({"data": data})


def folder(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text of {name}\r\nline 2\r\n".encode())
    return root


def texts(source: str, settings: Settings, split: str) -> list[str]:
    documents = get_source(source).documents
    assert documents is not None
    return [document.text for document in documents(settings, split)]


# The table


def test_every_name_of_a_mix_is_a_source() -> None:
    assert set(SOURCES) == {*PRETRAIN_SOURCES, *SFT_SOURCES}
    for name, source in SOURCES.items():
        assert source.name == name and not (source.documents and source.stream)
        assert (source.documents is not None or source.stream is not None) == (name in PRETRAIN_SOURCES)
        assert (source.chats is not None) == (name in SFT_SOURCES)
    assert is_optional("roam") and not is_optional("wikitext")


def test_the_published_sources_have_no_separators() -> None:
    assert {name for name, source in SOURCES.items() if not source.ends_documents} == {
        "wikitext",
        "fineweb_edu",
        "gutenberg",
    }


@needs_bundle
def test_the_reference_caches_have_no_separators() -> None:
    for name in ("wikitext", "fineweb_edu"):
        meta = json.loads((BUNDLE / f"v2/cache/pretrain/{name}/meta.json").read_text())
        ends = {meta["special_token_ids"]["eot"], 2}  # the end of a turn, and SentencePiece's end of text
        for shard in sorted((BUNDLE / f"v2/cache/pretrain/{name}").glob("*/*.bin")):
            assert not ends & set(np.fromfile(shard, "<u2").tolist()), shard


def test_unknown_sources_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown source 'wikipedia'; sources are chitchat, dolly15k, fineweb_edu, "):
        get_source("wikipedia")
    for alias, name in RENAMED_SOURCES.items():
        assert get_source(alias) is get_source(name) and get_source(name).name == name


def test_primer_jsonl_is_split_by_pythons_shuffle_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(i)}]} for i in range(40)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = settings_for(primer={"jsonl_path": str(path), "val_frac": 0.1, "seed": 42})
    chats = get_source("primer").chats
    assert chats is not None
    found = {split: [int(chat.messages[1].content) for chat in chats(settings, split)] for split in ("train", "val")}
    assert found["val"] == [3, 9, 10, 36]  # the first four of range(40) in the order of random.Random(42).shuffle
    assert found["train"] == [i for i in range(40) if i not in found["val"]]


def test_descriptions_are_json_and_change_with_the_data(tmp_path: Path) -> None:
    folder(tmp_path / "text", ["a.txt", "b.md"])
    folder(tmp_path / "roam", ["a.md", "b.md"])
    settings = settings_for(text={"root_dir": str(tmp_path / "text")}, roam={"root_dir": str(tmp_path / "roam")})
    for name in ("text", "roam", "primer"):
        before = get_source(name).describe(settings, "pretrain")
        assert json.loads(json.dumps(before)) == before == get_source(name).describe(settings, "pretrain")
        assert before["dataset_name"] == name and before["split_rule"]
    for name in ("text", "roam"):
        before = get_source(name).describe(settings, "pretrain")
        (tmp_path / name / "b.md").write_text("edited")
        assert get_source(name).describe(settings, "pretrain") != before


# Folders


@pytest.mark.parametrize("source", ["text", "roam"])
def test_missing_and_empty_folders_name_the_path_and_the_setting(source: str, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    settings = settings_for(**{source: {"root_dir": str(root)}})
    with pytest.raises(FileNotFoundError, match=rf"no folder {root}; .*data\.{source}\.root_dir"):
        texts(source, settings, "train")
    folder(root, ["picture.png"])
    with pytest.raises(FileNotFoundError, match=rf"{root} holds no files that match .*\.md.*data\.{source}\.root_dir"):
        texts(source, settings, "train")
    (root / "bad.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"no text to train on: 1 not UTF-8 in .*, such as bad\.md \(byte 3\)"):
        texts(source, settings, "train")


def test_text_files_are_cleaned_and_hidden_ones_skipped(tmp_path: Path) -> None:
    folder(tmp_path, ["a.txt", "sub/b.md", ".git/c.md", ".hidden.txt", "d.py"])
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfmarked")
    settings = settings_for(text={"root_dir": str(tmp_path), "val_frac": 0.0})
    assert texts("text", settings, "train") == ["text of a.txt\nline 2", "marked", "text of sub/b.md\nline 2"]
    assert texts("text", settings, "val") == []


def test_adding_a_file_moves_no_other_file(tmp_path: Path) -> None:
    settings = settings_for(text={"root_dir": str(tmp_path), "val_frac": 0.2})
    folder(tmp_path, [f"{i}.txt" for i in range(40)])
    before = {split: set(texts("text", settings, split)) for split in ("train", "val")}
    assert 2 <= len(before["val"]) <= 16 and len(before["train"]) + len(before["val"]) == 40
    folder(tmp_path, [f"new {i}.txt" for i in range(40)])
    for split in ("train", "val"):
        assert before[split] < set(texts("text", settings, split))
    other = settings_for(text={"root_dir": str(tmp_path), "val_frac": 0.2, "split_seed": 43})
    assert set(texts("text", other, "val")) != set(texts("text", settings, "val"))


def test_the_split_of_a_path_is_the_same_everywhere_and_fair() -> None:
    assert [i for i in range(50) if text.is_val(f"notes/{i}.txt", 0.2, 42)] == [17, 18, 26, 32, 41]
    assert abs(sum(text.is_val(f"{i}.md", 0.1, 1) for i in range(10_000)) - 1000) < 100
    assert not text.is_val("a", 0.0, 1)


def test_an_only_file_is_for_training(tmp_path: Path) -> None:
    settings = settings_for(text={"root_dir": str(tmp_path), "val_frac": 0.99})
    folder(tmp_path, ["book.txt"])
    assert len(texts("text", settings, "train")) == 1 and texts("text", settings, "val") == []


def test_roam_splits_whole_notes(tmp_path: Path) -> None:
    folder(tmp_path, [f"note_{i:02d}.md" for i in range(12)])
    settings = settings_for(roam={"root_dir": str(tmp_path)})
    train, val = texts("roam", settings, "train"), texts("roam", settings, "val")
    assert [t.split("\n")[0][-5:-3] for t in val] == ["06"]
    assert [t.split("\n")[0][-5:-3] for t in train[:3]] == ["08", "01", "07"] and len(train) == 11
    assert roam.split_indices(1, 0.1, 42) == ([0], [])


@needs_bundle
def test_reference_splits() -> None:
    wanted = json.loads((BUNDLE / "v2/splits.json").read_text())
    assert list(roam.split_indices(12, 0.1, 42)) == wanted["cache_cli_roam_split_indices_seed42_N12"]
    assert sorted(roam.split_indices(26, 0.1, 42)[1]) == wanted["sft_randperm_val_index_seed42_valfrac0.1_N26"]
    assert sorted(primer_source.val_indices(26, 0.1, 42)) == wanted["primer_jsonl_val_index_seed42_valfrac0.1_N26"]
    settings = settings_for(primer={"path": str(BUNDLE / "v2/corpus/primer.txt")})
    for split, joined in wanted["primer_split_seed42"].items():
        assert settings.data.primer.delimiter.join(texts("primer", settings, split)) == joined


# The primer


def test_the_shipped_primer_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_for()
    train, val = texts("primer", settings, "train"), texts("primer", settings, "val")
    assert len(val) == (len(train) + len(val)) // 10 and all("assistant: " in block for block in train)
    chats = get_source("primer").chats
    assert chats is not None
    n_train, n_val = (len(list(chats(settings, split))) for split in ("train", "val"))
    assert n_val == (n_train + n_val) // 10 > 0
    with pytest.raises(FileNotFoundError, match=r"no primer file mine\.txt; set data\.primer\.path"):
        texts("primer", settings_for(primer={"path": "mine.txt"}), "train")
    with pytest.raises(FileNotFoundError, match=r"set data\.primer\.jsonl_path"):
        list(chats(settings_for(primer={"jsonl_path": "mine.jsonl"}), "train"))
