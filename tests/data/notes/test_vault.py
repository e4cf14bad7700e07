"""A vault with known flaws, from its files to the bytes of a cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.data import roam, text
from niels_gpt.data.notes import vault as vaults
from niels_gpt.data.notes.report import make_report
from niels_gpt.data.notes.source import open_notes
from niels_gpt.data.notes.vault import Vault
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data.notes.planted import CARD, KEYS, MAIL, PHONE, QUOTE, TRUTH, plant

SPLIT = {"roam": roam.split_vault, "text": text.split_vault}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("planted") / "vault")


def settings_for(root: Path, source: str = "roam", **notes: Any) -> Settings:
    return validate_overrides({"data": {source: {"root_dir": str(root)}, "notes": notes}})


def report_on(settings: Settings, source: str = "roam") -> tuple[dict[str, Any], Vault]:
    vault = open_notes(settings, source)
    train, val = SPLIT[source](vault, settings)
    return make_report(vault, train, val), vault


@pytest.mark.parametrize("source", ["roam", "text"])
def test_the_report_is_the_truth(planted: Path, source: str) -> None:
    report, vault = report_on(settings_for(planted, source), source)
    assert report["files"] == TRUTH["files"] and report["documents"] == 60
    assert set(report["dropped"]) == {"exact duplicate", "near duplicate", "empty"}
    for reason, found in report["dropped"].items():
        assert {one["name"] for one in found} == TRUTH[reason]
    for one in report["dropped"]["exact duplicate"]:
        assert one["detail"] == f"of daily/{int(one['name'][-4]) + 1:02d}.md"
    for one in report["dropped"]["near duplicate"]:
        assert one["detail"].startswith(f"of daily/{20 + int(one['name'][-4])}.md, 8")
    assert report["secrets_by_file"] == TRUTH["secrets_by_file"]
    assert report["secrets"] == {"card": 1, "e-mail": 1, "key": 3, "phone": 1}
    assert report["decoded"] == TRUTH["decoded"] and report["skipped"] == TRUTH["skipped"]
    assert report["kept"]["documents"] == TRUTH["kept"] and report["sharing_a_passage"] == TRUTH["sharing"]
    for what in ("documents", "bytes"):
        assert sum(report["split"][split][what] for split in ("train", "val")) == report["kept"][what]
    assert report["kept"]["bytes"] == sum(len(vault.text(i).encode()) for i in vault.kept)
    assert report["split"]["val"]["documents"] > 0
    printed = json.dumps(report)
    assert not any(secret in printed for secret in (*KEYS, MAIL, PHONE, CARD))


def decoded(folder: Path, split: str, tokenizer: Tokenizer) -> str:
    shards = sorted((folder / split).glob("*.bin"))
    ids = np.concatenate([np.fromfile(shard, dtype="<u2") for shard in shards])
    return tokenizer.decode([int(i) for i in ids if int(i) not in set(tokenizer.special_token_ids().values())])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_no_secret_reaches_a_cache_and_a_second_build_is_the_same(
    planted: Path, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, kind: str
) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else tiny_tokenizer
    for place in ("one", "two"):
        vaults._remembered.clear()
        build_pretrain(settings_for(planted), tokenizer, "roam", root=tmp_path / place)
    written = {p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert written == {
        p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file()
    }
    texts = "".join(decoded(tmp_path / "one" / "roam", split, tokenizer) for split in ("train", "val"))
    assert "The key is [key] and stays here." in texts and texts.count("[key]") == 3
    assert "write to [e-mail]" in texts and "call [phone] or pay with [card]" in texts
    for secret in (*KEYS, MAIL, PHONE, CARD):
        for part in (secret, secret[:12], secret[-12:]):
            assert part not in texts
            as_tokens = np.array(tokenizer.encode(part), dtype="<u2").tobytes()
            assert not any(part.encode() in content or as_tokens in content for content in written.values())


def test_secrets_can_be_kept_or_their_files_skipped(planted: Path) -> None:
    kept, vault = report_on(settings_for(planted, secrets="keep"))
    assert all(any(key in vault.text(i) for i in vault.kept) for key in KEYS) and not kept["secrets"]
    skipped, vault = report_on(settings_for(planted, secrets="skip"))
    assert {one["name"] for one in skipped["dropped"]["secret"]} == set(TRUTH["secrets_by_file"])
    assert not any(key in vault.text(i) for i in vault.kept for key in KEYS)
    assert skipped["secrets"]["key"] == 3


def shared_runs(vault: Vault, split: tuple[list[int], list[int]], tokenizer: Tokenizer, n: int = 50) -> int:
    def runs(i: int) -> set[tuple[int, ...]]:
        ids = tokenizer.encode(vault.text(i) + ("\n\n" if tokenizer.eot_id is None else ""))
        return {tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)}

    train, val = (set().union(*map(runs, numbers)) for numbers in split)
    return len(train & val)


@pytest.mark.parametrize("source", ["roam", "text"])
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_validation_shares_no_run_of_50_tokens_with_training(
    planted: Path, tiny_tokenizer: SentencePieceTokenizer, source: str, seed: int
) -> None:
    chosen = {"root_dir": str(planted), "split_seed": seed, "val_frac": 0.3}
    leaks = {}
    for run in (50, 0):
        settings = validate_overrides({"data": {source: chosen, "notes": {"shared_run": run}}})
        vault = open_notes(settings, source)
        split = SPLIT[source](vault, settings)
        assert sorted(split[0] + split[1]) == vault.kept and len(split[1]) > 5
        leaks[run] = [shared_runs(vault, split, tokenizer) for tokenizer in (ByteTokenizer(), tiny_tokenizer)]
    assert leaks[50] == [0, 0]
    assert leaks[0][0] > 0, "the passage is long enough to be seen where it is not looked for"


def test_adding_a_file_changes_no_other_text(planted: Path, tmp_path: Path) -> None:
    root = tmp_path / "vault"
    shutil.copytree(planted, root, symlinks=True)
    (root / "round").unlink()
    settings = settings_for(root)

    def texts() -> dict[str, str]:
        return {d.name: d.text for split in ("train", "val") for d in roam.documents(settings, split)}

    before = texts()
    (root / "another.md").write_text("One more note about a wholly different matter, added later on.")
    after = texts()
    assert after.pop("another.md") and after == before


def test_roam_without_groups_splits_as_published(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.md").write_text(f"note number {i * 7919} says {i * i + 17}")
    settings = settings_for(tmp_path, near_duplicate=1.0)
    vault = open_notes(settings, "roam")
    assert roam.split_vault(vault, settings) == roam.split_indices(30, 0.1, 42)
    names = [d.name for split in ("val", "train") for d in roam.documents(settings, split)]
    assert names == [f"{i:02d}.md" for split in reversed(roam.split_indices(30, 0.1, 42)) for i in split]


def test_groups_move_whole_and_val_keeps_its_size() -> None:
    group = [0, 1, 2, 0, 0, 5, 6, 5]
    assert roam.split_groups([0, 1, 2, 3, 4, 5, 6, 7], 2, group) == ([0, 3, 4, 5, 6, 7], [1, 2])
    assert roam.split_groups([5, 0, 1, 2, 3, 4, 6, 7], 3, group) == ([0, 2, 3, 4, 6], [5, 1, 7])
    assert roam.split_groups([3, 0, 4], 1, group) == ([3, 0, 4], [])
    assert roam.split_groups([3], 0, group) == ([3], [])
    assert roam.split_groups([1, 2], 0, group) == ([2], [1])


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(0, 30), st.randoms(use_true_random=False))
def test_groups_are_never_divided(names: list[int], n_val: int, rng: random.Random) -> None:
    group = [names.index(name) for name in names]
    order = list(range(len(names)))
    rng.shuffle(order)
    train, val = roam.split_groups(order, n_val, group)
    assert sorted(train + val) == sorted(order) and len(val) <= max(n_val, 1)
    assert not {group[i] for i in train} & {group[i] for i in val}
    alone = roam.split_groups(order, min(n_val, len(order)), list(range(len(order))))
    wanted = max(n_val, 1) if len(order) > 1 else 0
    assert alone == (order[wanted:], order[:wanted])


def test_a_vault_is_read_once_until_a_file_changes(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("first")
    settings = settings_for(tmp_path)
    vault = open_notes(settings, "roam")
    assert open_notes(settings, "roam") is vault
    (tmp_path / "a.md").write_text("second, and longer")
    os.utime(tmp_path / "a.md", ns=(1, 1))
    assert open_notes(settings, "roam") is not vault


def test_descriptions_change_with_content_rules_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("first")
    seen = [roam.describe(settings_for(tmp_path), "pretrain")]
    assert seen[0] == roam.describe(settings_for(tmp_path), "pretrain") == json.loads(json.dumps(seen[0]))
    for change in ({"clean": False}, {"secrets": "keep"}, {"shared_run": 60}, {"near_duplicate": 0.9}):
        seen.append(roam.describe(settings_for(tmp_path, **change), "pretrain"))
    monkeypatch.setattr("niels_gpt.data.notes.source.RULES", 999)
    seen.append(roam.describe(settings_for(tmp_path), "pretrain"))
    (tmp_path / "b.md").write_text("second")
    seen.append(roam.describe(settings_for(tmp_path), "pretrain"))
    assert all(one != other for i, one in enumerate(seen) for other in seen[i + 1 :])


def test_block_references_are_resolved_across_notes(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("- first\n- the fox is quick\n  id:: 64c4b2c3-1111-2222-3333-444455556666\n- last")
    (tmp_path / "b.md").write_text(
        "He said ((64c4b2c3-1111-2222-3333-444455556666)) and ((64c4b2c3-0000-2222-3333-444455556666))."
    )
    (tmp_path / "c.md").write_text("A thought worth keeping. ^think1")
    (tmp_path / "d.md").write_text("As noted: [[c#^think1]] and ![[c#^think1]]")
    vault = open_notes(settings_for(tmp_path), "roam")
    assert [vault.text(i) for i in vault.kept] == [
        "- first\n- the fox is quick\n- last",
        "He said the fox is quick and.",
        "A thought worth keeping.",
        "As noted: A thought worth keeping. and c",
    ]


def test_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n[[Page]] and a@b.org\n")
    vault = open_notes(settings_for(tmp_path, clean=False, secrets="keep"), "roam")
    assert vault.text(0) == "[[Page]] and a@b.org"


def test_the_store_keeps_texts_apart(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = open_notes(settings_for(planted), "roam")
    monkeypatch.setattr(vaults, "_IN_MEMORY", 1000)  # on disk from the second text on
    notes = settings_for(planted).data.notes
    on_disk = vaults.scan(planted, ["**/*.md"], notes, setting="here", hidden=True)
    assert [on_disk.text(i) for i in on_disk.kept] == [in_memory.text(i) for i in in_memory.kept]
    assert all(one.start + one.size == other.start for one, other in pairwise(on_disk.notes))
    assert sum(QUOTE in on_disk.text(i) for i in on_disk.kept) == TRUTH["sharing"]


@given(
    st.dictionaries(
        st.sampled_from(["a.md", "b.html", "c.jsonl", "d.txt", "e/f.md"]), st.binary(max_size=200), min_size=1
    )
)
@hypothesis_settings(max_examples=60)
def test_no_bytes_are_an_error(contents: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for path, content in contents.items():
            (Path(name) / path).parent.mkdir(exist_ok=True)
            (Path(name) / path).write_bytes(content)
        notes = settings_for(Path(name)).data.notes
        vault = vaults.scan(name, ["**/*"], notes, setting="here", hidden=True)
        assert {note.name.partition("#")[0] for note in vault.notes} | {"c.jsonl"} >= set(contents)
        assert all(vault.text(i) and not vault.notes[i].reason for i in vault.kept)
        json.dumps(make_report(vault, vault.kept, []))
