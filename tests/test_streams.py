"""Byte streams: what is in them, when they are built again, what is missing, and a byte model that trains on them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from niels_gpt import files, paths
from niels_gpt.batching import get_batch
from niels_gpt.data import registry
from niels_gpt.data.primer import DIALOGUE_DELIMITER, split_primer_text
from niels_gpt.data.registry import Source
from niels_gpt.data.types import SPLITS, Document
from niels_gpt.mixes import open_mixes, stream_config
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.streams import StreamBuildConfig, build_sources, build_streams, split_paths
from niels_gpt.tokenizer import ByteTokenizer
from niels_gpt.train.pretrain import run_pretrain
from tests.reference import BUNDLE, needs_bundle

ROOT = Path(__file__).resolve().parents[1]
WIKI = {
    "train": [" = Title = \n", "One paragraph of it. \u00e9t\u00e9\n", "Another one.\n"],
    "val": [" = Held out = \n", "v" * 600],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve notes and nothing else, to stand in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "deeper").mkdir(parents=True)
    for i in range(12):
        name = f"notes/{'deeper/' if i % 2 else ''}n{i:02}.md"
        (tmp_path / name).write_bytes(f"# note {i}\r\n{f'text{i} ' * 150}\u00e9{i}".encode())
    return tmp_path


@pytest.fixture
def wiki(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """wikitext as a source whose rows are in memory."""
    rows = {split: list(texts) for split, texts in WIKI.items()}

    def documents(settings: Settings, split: str) -> Iterator[Document]:
        return (Document(text, "wikitext") for text in rows[split])

    source = Source("wikitext", lambda settings, phase: {"dataset_name": "wikitext"}, documents=documents)
    monkeypatch.setitem(registry.SOURCES, "wikitext", source)
    monkeypatch.setattr(registry, "PLANNED", (), raising=False)
    return rows


def config(*names: str, **changes: object) -> StreamBuildConfig:
    given = {"roam_root": "notes", "cache_dir": "streams", "enabled_sources": names, "required_sources": names}
    return StreamBuildConfig(**{**given, **changes})  # type: ignore[arg-type]


def written() -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in sorted(Path("streams").iterdir())}


def test_the_defaults_are_those_documented() -> None:
    cfg = StreamBuildConfig()
    assert cfg.enabled_sources == cfg.required_sources == ("wiki", "roam", "primer")
    where = (Path("data/.roam-data"), Path("data/primer.txt"), Path("data/cache/streams"))
    assert (cfg.roam_root, cfg.primer_path, cfg.cache_dir) == where
    assert (cfg.roam_val_frac, cfg.primer_val_frac, cfg.seed, cfg.doc_separator) == (0.1, 0.1, 42, "\n\n")
    assert cfg.delimiter == DIALOGUE_DELIMITER and not cfg.force_rebuild and not cfg.allow_missing_sources


def test_what_is_in_them(wiki: dict[str, list[str]]) -> None:
    wiki["train"].append("w" * 600)
    train, val = build_sources(config("wiki", "roam", "primer"))
    assert list(train) == list(val) == ["wiki", "roam", "primer"]
    assert train["wiki"] == "\n\n".join(wiki["train"]).encode() and val["wiki"] == "\n\n".join(wiki["val"]).encode()
    primer = (ROOT / "data/primer.txt").read_text(encoding="utf-8")
    parts = split_primer_text(primer, delimiter=DIALOGUE_DELIMITER, val_frac=0.1, seed=42)
    assert (train["primer"], val["primer"]) == tuple(part.encode() for part in parts)
    notes = {path: path.read_bytes().replace(b"\r\n", b"\n") for path in Path("notes").resolve().rglob("*.md")}
    for found, chosen in zip((train, val), split_paths(sorted(notes), 0.1, 42), strict=True):
        assert found["roam"] == b"\n\n".join(notes[path] for path in chosen)
    assert {f"{n}_{s}.{e}" for n in train for s in SPLITS for e in ("bin", "meta.json")} == set(written())


def test_meta_files(wiki: dict[str, list[str]]) -> None:
    build_streams(config("wiki", "roam", "primer"))
    own = {"n_bytes", "sha256"}
    meta = {name: files.read_json(f"streams/{name}_train.meta.json") for name in ("wiki", "roam", "primer")}
    assert {key: meta["wiki"][key] for key in meta["wiki"].keys() - own} == {
        "source": "wiki",
        "split": "train",
        "n_docs": 3,
        "total_chars": sum(map(len, wiki["train"])),
        "sep": "\n\n",
    }
    assert meta["roam"].keys() - own == {"source", "split", "sep", "files", "seed", "val_frac", "secrets"}
    assert meta["roam"]["files"][0].keys() == {"path", "mtime_ns", "size"} and len(meta["roam"]["files"]) == 11
    keys = {"path", "mtime_ns", "size", "delimiter", "source", "split", "seed", "val_frac"}
    assert meta["primer"].keys() - own == keys
    assert all(m["sha256"] == files.sha256_file(f"streams/{name}_train.bin") for name, m in meta.items())


def test_they_are_built_again_only_when_something_changed(wiki: dict[str, list[str]]) -> None:
    cfg = config("wiki", "roam", "primer")
    build_streams(cfg)
    first = written()
    build_streams(cfg)
    assert written() == first

    def rebuilt() -> set[str]:
        after = written()
        changed = {name for name, (_, inode) in after.items() if inode != first[name][1]}
        first.update(after)
        return {name for name in changed if name.endswith(".bin")}

    os.utime("notes/n00.md", ns=(1, 1))
    build_streams(cfg)
    assert rebuilt() == {"roam_train.bin"}
    wiki["val"][1] = "u" * 600  # as many rows and characters as before
    build_streams(cfg)
    assert rebuilt() == {"wiki_val.bin"}
    Path("streams/primer_val.bin").write_bytes(b"damaged")
    first.update(written())
    build_streams(cfg)
    assert rebuilt() == {"primer_val.bin"}
    Path("streams/primer_train.meta.json").write_text("{")
    build_streams(cfg)
    assert rebuilt() == {"primer_train.bin"}
    build_streams(replace(cfg, seed=43))
    assert rebuilt() == {f"{name}_{split}.bin" for name in ("roam", "primer") for split in SPLITS}
    build_streams(replace(cfg, seed=43, force_rebuild=True))
    assert len(rebuilt()) == 6


def test_deleted_streams_are_built_again() -> None:
    build_sources(config("roam"))
    before = written()
    shutil.rmtree("streams")
    build_sources(config("roam"))
    assert {name: content for name, (content, _) in written().items()} == {n: c for n, (c, _) in before.items()}


@pytest.mark.parametrize("mode", ["mask", "skip", "keep"])
def test_secrets_in_notes_stay_out_of_the_streams(folder: Path, mode: str) -> None:
    Path("notes/n00.md").write_text("mail me at someone@example.org, " * 40)
    settings = validate_overrides({"data": {"notes": {"secrets": mode}}})
    built = build_streams(config("roam", settings=settings))
    text = b"".join(path.read_bytes() for streams in built.values() for path in streams.values())
    assert (b"someone@example.org" in text) == (mode == "keep")
    assert (b"mail me at" in text) == (mode != "skip")


@needs_bundle
def test_published_roam_stream(folder: Path) -> None:
    as_published = validate_overrides({"data": {"notes": {"secrets": "keep"}}})
    cfg = config("roam", roam_root=BUNDLE / "v2/corpus/roam", roam_val_frac=0.3, settings=as_published)
    build_streams(cfg)
    for split in SPLITS:
        published = BUNDLE / "v2/streams_cache" / f"roam_{split}"
        assert Path(f"streams/roam_{split}.bin").read_bytes() == published.with_suffix(".bin").read_bytes()
        theirs = json.loads(published.with_suffix(".meta.json").read_text())
        ours = files.read_json(f"streams/roam_{split}.meta.json")
        assert ours.keys() == theirs.keys() | {"n_bytes", "sha256"}
        names = [[Path(file["path"]).name for file in meta["files"]] for meta in (ours, theirs)]
        assert names[0] == names[1]
    ours = {key: value for key, value in ours.items() if key not in ("n_bytes", "sha256")}  # as published ones are
    files.write_json("streams/roam_val.meta.json", ours)
    before = written()
    build_streams(cfg)
    assert written() == before


@needs_bundle
def test_published_path_split() -> None:
    published = json.loads((BUNDLE / "v2/splits.json").read_text())["roam_split_seed42_valfrac0.1"]
    listed = sorted(Path(path) for path in published["train"] + published["val"])
    train, val = split_paths(listed, 0.1, 42)
    assert ([str(p) for p in train], [str(p) for p in val]) == (published["train"], published["val"])


def test_one_note_is_for_training() -> None:
    assert split_paths([Path("a")], 0.5, 1) == ([Path("a")], [])


# what is missing or wrong


def test_missing_required_sources_are_all_named_with_what_to_do() -> None:
    cfg = config("primer", "roam", roam_root="nowhere", primer_path="gone.txt")
    with pytest.raises(RuntimeError) as caught:
        build_sources(cfg)
    said = str(caught.value)
    assert "nowhere; put Markdown notes there, or remove roam from enabled_sources" in said
    assert "gone.txt; put the file there" in said
    assert not Path("streams").exists()


def test_without_a_connection_the_error_says_how_to_do_without_wikitext(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real loader: tests see no hub, and an empty cache of it."""
    with pytest.raises(RuntimeError) as caught:
        build_sources(config("wiki", "primer"))
    said = str(caught.value)
    assert "- wiki: wikitext: it is not in the Hugging Face cache" in said and "run once with a connection" in said
    assert "connect once, or do without it: allow_missing_sources=True or required_sources=() (quality drops)" in said
    train, _ = build_sources(config("wiki", "primer", allow_missing_sources=True))
    assert list(train) == ["primer"] and "warning: no byte stream wiki" in capsys.readouterr().err


def test_allowed_missing_sources_are_left_out_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"allow_missing_sources": True}, {"required_sources": ("primer",)}):
        train, val = build_sources(config("primer", "roam", roam_root="nowhere", **changes))
        assert list(train) == list(val) == ["primer"]
        assert "warning: no byte stream roam: there are no notes (*.md) in nowhere" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no byte stream is left of roam"):
        build_sources(config("roam", roam_root="nowhere", allow_missing_sources=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"required_sources": ("primer", "wiki")}, "required_sources has wiki, missing from enabled_sources"),
        ({"enabled_sources": ("primer", "web")}, "unknown byte stream web; there are wiki, roam, primer"),
        ({"primer_val_frac": 1.0}, "val_frac must be at least 0 and below 1"),
    ],
)
def test_contradictions(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_sources(config("primer", **changes))


def test_short_streams_are_named_with_T() -> None:
    Path("few.txt").write_text("user: a\nassistant: b" + DIALOGUE_DELIMITER + "user: c\nassistant: d")
    cfg = config("primer", primer_path="few.txt")
    with pytest.raises(ValueError, match=r"Stream\(s\) too short: primer \(train\): 20 bytes.*T\+1 = 513 .*lower T"):
        build_sources(cfg)
    train, val = build_sources(cfg, T=19)
    assert {len(train["primer"]), len(val["primer"])} == {20}


def test_a_sentinel_in_a_text_stops_the_build_and_writes_nothing() -> None:
    Path("notes/n03.md").write_text(f"hello {SPECIAL_TOKENS['eot']}")
    with pytest.raises(ValueError, match="special token literal detected in dataset=roam_"):
        build_sources(config("roam"))
    assert not list(Path("streams").glob("*train*"))


def test_notes_that_are_not_utf8_are_named() -> None:
    Path("notes/n03.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"n03\.md is not UTF-8 \(byte 3\)"):
        build_sources(config("roam"))


# training on them


def byte_overrides() -> dict[str, object]:
    """configs/byte.json, smaller and without chitchat."""
    overrides = files.read_json(ROOT / "configs" / "byte.json")
    overrides.pop("_why")
    overrides["model"] |= {"T": 64, "C": 32, "L": 2, "H": 2, "d_ff": 64, "dropout": 0.0}
    overrides["data"] |= {
        "mix_pretrain": {"primer": 0.9, "roam": 0.1},
        "val_pretrain_source": "primer",
        "roam": {"root_dir": "notes"},
    }
    overrides["training"] = {
        "pretrain": {
            **{"micro_B": 8, "total_steps": 40, "warmup_steps": 2, "base_lr": 0.01, "log_every": 20},
            **{"eval_every": 20, "eval_steps": 2, "ckpt_every": 40},
        }
    }
    return overrides


def test_a_byte_model_trains_from_its_config_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHECKPOINT_DIR", "RUNS_DIR", "CONFIG_DIR"):
        monkeypatch.setattr(paths, name, folder / name)
    result = run_pretrain(byte_overrides(), device="cpu", quiet=True)
    assert result["final_step"] == 40 and result["best_val_loss"] < 4.0 < 5.5  # ln 256 = 5.55 untrained
    saved = torch.load(result["latest_path"], weights_only=True)
    assert saved["model_cfg"]["V"] == 256 and "blocks.0.mlp.fc1.weight" in saved["model_state"]
    recorded = saved["resume"]["data"]
    assert recorded == {n: files.sha256_file(f"data/cache/streams/{n}_train.bin") for n in ("primer", "roam")}


def test_the_mix_goes_on_without_missing_notes(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = byte_overrides()
    overrides["data"]["roam"] = {"root_dir": "nowhere"}  # type: ignore[index]
    mixes = open_mixes(validate_overrides(overrides), ByteTokenizer(), 64)
    (train, weights), (val, _) = mixes["train"], mixes["val"]
    assert list(train) == list(val) == ["primer"] and weights == {"primer": 1.0}
    said = capsys.readouterr().err
    assert "no byte stream roam" in said and "roam is left out of the mix" in said
    x, _ = get_batch(train, weights, 2, 64, "cpu", torch.Generator().manual_seed(1))
    assert ByteTokenizer().decode(x[0]).isprintable() or "\n" in ByteTokenizer().decode(x[0])


def test_wikitext_of_the_mix_is_the_stream_wiki(wiki: dict[str, list[str]]) -> None:
    overrides = byte_overrides()
    overrides["data"] |= {  # type: ignore[operator]
        "mix_pretrain": {"wikitext": 0.72, "roam": 0.18, "primer": 0.1},
        "val_pretrain_source": "wikitext",
    }
    settings = validate_overrides(overrides)
    assert stream_config(settings).enabled_sources == ("wiki", "roam", "primer")
    assert stream_config(settings).required_sources == ("wiki", "primer")
    train, weights = open_mixes(settings, ByteTokenizer(), 16)["train"]
    assert weights == pytest.approx({"wikitext": 0.72, "roam": 0.18, "primer": 0.1})
    assert train["wikitext"].arrays[0].tobytes() == "\n\n".join(wiki["train"]).encode()


def test_the_settings_choose_what_may_be_missing() -> None:
    overrides = byte_overrides()
    overrides["data"] |= {  # type: ignore[operator]
        "primer": {"path": "gone.txt"},
        "text": {"root_dir": "notes", "val_frac": 0.5},
        "mix_pretrain": {"primer": 0.5, "text": 0.5},
        "streams": {"required_sources": [], "enabled_sources": ["primer", "roam"]},
    }
    with pytest.raises(ValueError, match="is without a byte stream; streams are roam"):
        open_mixes(validate_overrides(overrides), ByteTokenizer(), 64)
    overrides["data"]["streams"] = {"allow_missing_sources": True}  # type: ignore[index]
    with pytest.raises(ValueError, match="the validation source primer is without a byte stream; streams are text"):
        open_mixes(validate_overrides(overrides), ByteTokenizer(), 64)
    overrides["data"]["val_pretrain_source"] = "text"  # type: ignore[index]
    assert open_mixes(validate_overrides(overrides), ByteTokenizer(), 64)["train"][1] == {"text": 1.0}
