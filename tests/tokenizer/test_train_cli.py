"""Training tokenizers from the command line: the files it writes, what it reads, and how it fails."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from niels_gpt import files
from niels_gpt.settings import default_settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS
from niels_gpt.tokenizer import load_tokenizer, missing_tokenizer
from niels_gpt.tokenizer.corpus import Corpus, matching_files, mix_corpora, source_corpus, within
from niels_gpt.tokenizer.train_cli import main

ROOT = Path(__file__).resolve().parents[2]
BARE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
WRITTEN = ("spm.model", "spm.vocab", "tokenizer_meta.json")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two text files and hidden notes, to stand in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / ".notes").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_bytes(b"one two three four\r\nfive six seven\n")
    (tmp_path / "texts" / "a.txt").write_text("eight nine ten \u00e9l\u00e8ve " * 20, encoding="utf-8")
    (tmp_path / "texts" / ".notes" / "n.md").write_text("a note on rivers", encoding="utf-8")
    return tmp_path


def train(*arguments: str, out: str = "out", vocab: int = 300) -> int:
    return main([*arguments, "--out_dir", out, "--vocab_size", str(vocab)])


def written(out: str) -> dict[str, bytes]:
    return {name: Path(out, name).read_bytes() for name in WRITTEN}


def test_what_it_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    globs = ["texts/**/*.txt", "texts/*.txt", str(folder / "texts" / ".notes" / "*.md")]
    assert train(*(part for glob in globs for part in ("--input_glob", glob)), "--seed", "7") == 0
    meta = files.read_json("out/tokenizer_meta.json")
    names = ["texts/.notes/n.md", "texts/a.txt", "texts/b.txt"]
    assert (meta["input_globs"], meta["input_files"], meta["dataset_sources"]) == (globs, names, [])
    clean = [Path(name).read_bytes().replace(b"\r\n", b"\n") + b"\n" for name in names]
    assert meta["inputs_sha256"] == hashlib.sha256(b"".join(clean)).hexdigest()
    assert (meta["vocab_size"], meta["model_type"], meta["seed"]) == (300, default_settings().tokenizer.type, 7)
    assert meta["special_tokens"] == SPECIAL_TOKEN_IDS and meta["sentencepiece_version"]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(WRITTEN)
    assert load_tokenizer("out/spm.model", SPECIAL_TOKEN_IDS).sha256 == meta["tokenizer_sha256"]
    out = capsys.readouterr().out
    assert meta["tokenizer_sha256"] in out and "from 3 inputs" in out


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_bytes(model_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--source", "primer", "--model_type", model_type)
    assert train(*arguments, out="one", vocab=600) == train(*arguments, out="two", vocab=600) == 0
    assert written("one") == written("two")
    assert files.read_json("one/tokenizer_meta.json")["model_type"] == model_type
    capsys.readouterr()
    assert train(*arguments, out="one", vocab=600) == 0
    assert "the same tokenizer as before" in capsys.readouterr().out
    assert train(*arguments, out="one", vocab=601) == 0
    assert "it replaced another" in capsys.readouterr().out


def test_named_sources_are_recorded_and_only_their_training_text_is_read() -> None:
    assert train("--source", "primer", vocab=600) == 0
    meta = files.read_json("out/tokenizer_meta.json")
    (source,) = meta["dataset_sources"]
    texts = list(source_corpus("primer", default_settings()))
    assert source["source"] == "primer" and source["texts"] == len(texts) > 1000
    assert source["bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["inputs_sha256"] == hashlib.sha256("".join(text + "\n" for text in texts).encode()).hexdigest()


def test_a_config_says_text_size_and_place(folder: Path) -> None:
    config = folder / "mine.json"
    overrides = {
        "tokenizer": {"model_path": "kept/here/spm.model", "vocab_size": 400},
        "data": {"mix_pretrain": {"primer": 1.0}, "val_pretrain_source": "primer"},
    }
    files.write_json(config, overrides)
    assert main(["--config", str(config)]) == 0
    assert load_tokenizer("kept/here/spm.model").vocab_size == 400
    assert files.read_json("kept/here/tokenizer_meta.json")["dataset_sources"][0]["source"] == "primer"


def test_a_vocabulary_above_the_models_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write_json(folder / "small.json", {"model": {"V": 285}, "tokenizer": {"vocab_size": 285}})
    glob = ("--input_glob", "texts/*.txt", "--config", "small.json")
    assert train(*glob, vocab=290) == 0
    assert "warning: 290 pieces are more than model.V=285: set model.V to 290" in capsys.readouterr().err
    assert train(*glob, vocab=285) == 0
    assert capsys.readouterr().err == ""


def test_the_command_of_the_error_makes_the_default_tokenizer_offline(capsys: pytest.CaptureFixture[str]) -> None:
    """What a stranger is told to run, run word for word (with less text, to be quick)."""
    tokenizer = default_settings().tokenizer
    said = missing_tokenizer(Path(tokenizer.model_path))
    command = said.split("installation: ")[1].split(" (or")[0].split()
    assert command[:2] == ["niels-gpt", "tokenizer"]
    kept = [word for word in command[2:] if word != "chitchat"]
    kept.remove("--source")
    assert main([*kept, "--vocab_size", "512"]) == 0
    assert load_tokenizer(tokenizer.model_path).vocab_size == 512
    with pytest.raises(FileNotFoundError, match="niels-gpt tokenizer --source chitchat --source primer"):
        load_tokenizer("elsewhere/spm.model")


@pytest.mark.soak
def test_the_shipped_text_fills_the_default_vocabulary() -> None:
    pytest.importorskip("chitchat_dataset")
    assert main(["--source", "chitchat", "--source", "primer"]) == 0
    tokenizer = default_settings().tokenizer
    assert load_tokenizer(tokenizer.model_path).vocab_size == tokenizer.vocab_size


def test_nothing_matched(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--input_glob", "texts/*.rst", "--input_glob", "nowhere/**/*.md") == 1
    said = capsys.readouterr().err
    assert "no files match 'texts/*.rst', 'nowhere/**/*.md'" in said and not Path("out").exists()
    assert train("--input_glob", "texts/*.rst", "--input_glob", "texts/*.txt", vocab=290) == 0
    assert "warning: no files match 'texts/*.rst'" in capsys.readouterr().err


def test_too_big_a_vocabulary_names_the_largest_and_keeps_the_old_files(capsys: pytest.CaptureFixture[str]) -> None:
    glob = ("--input_glob", "texts/*.txt")
    assert train(*glob, vocab=290) == 0
    before = written("out")
    capsys.readouterr()
    assert train(*glob, vocab=5000) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: vocab_size 5000 is too big")
    assert written("out") == before
    largest = int(said.split("at most ")[1].split()[0])
    assert train(*glob, vocab=largest) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"so {SPECIAL_TOKENS['usr']} it goes".encode(), "special token literal detected in dataset=texts/bad.txt"),
        ("caf\u00e9".encode("latin-1"), "texts/bad.txt is not UTF-8 (byte 3)"),
    ],
)
def test_bad_files_are_named(content: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts/bad.txt").write_bytes(content)
    assert train("--input_glob", "texts/*.txt") == 1
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not Path("out").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--seed", "x", "--source", "primer"], ["--model_type", "word", "--source", "primer"], ["--fineweb_bytes=-1"]],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    if not arguments:
        assert "--source chitchat --source primer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonsense", "dolly15k"])
def test_sources_without_text_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--source", name) == 1
    assert name in capsys.readouterr().err


def test_both_ways_to_start_it() -> None:
    command = [sys.executable, "scripts/train_tokenizer.py", "--input_glob", "nowhere/*.txt"]
    done = subprocess.run(command, cwd=ROOT, env=BARE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == f"error: no files match 'nowhere/*.txt' in {ROOT}\n"
    assert importlib.import_module("scripts.train_tokenizer").main is main  # what `python -m` runs


def test_usage_names_the_program_that_was_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for started, name in (
        ("bin/niels-gpt", "niels-gpt tokenizer"),
        ("scripts/train_tokenizer.py", "train_tokenizer.py"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        with pytest.raises(SystemExit):
            main(["--seed", "x"])
        err = capsys.readouterr().err
        assert err.startswith(f"usage: {name} [-h]") and f"\n{name}: error: " in err


def test_both_spellings_of_flags() -> None:
    assert main(["--input-glob", "texts/*.txt", "--out-dir", "out", "--vocab-size", "290", "--model-type", "bpe"]) == 0


# text within budgets


def test_a_budget_ends_after_the_text_that_reaches_it() -> None:
    texts = ["aaaa", "\u00e9\u00e9", "cc", "d"]
    assert list(within(texts, 5)) == ["aaaa", "\u00e9\u00e9"]
    assert list(within(texts, 4)) == ["aaaa"]
    assert list(within(texts, 0)) == []
    assert list(within(texts, None)) == texts

    def endless() -> Iterator[str]:
        while True:
            yield "text"

    assert len(list(within(endless(), 41))) == 11


def test_a_corpus_counts_what_is_read_with_lf_ends() -> None:
    corpus = Corpus("c", lambda: iter(["a\r\nb", "\u00e9"]), {"source": "c"})
    assert list(corpus) == ["a\nb", "\u00e9"] == list(corpus)
    assert corpus.record() == {"source": "c", "texts": 2, "bytes": 5}


def test_files_come_once_and_sorted(folder: Path) -> None:
    (folder / "texts" / "again.txt").symlink_to(folder / "texts" / "b.txt")
    found = matching_files(["texts/*.txt", str(folder / "texts/b.txt"), "texts/**/*.txt"])
    assert [path.as_posix() for path in found] == ["texts/a.txt", "texts/again.txt"]


def test_a_mix_is_read_by_its_shares() -> None:
    settings = validate_overrides(
        {"data": {"mix_pretrain": {"primer": 0.1, "chitchat": 0.9}, "val_pretrain_source": "primer"}}
    )
    pytest.importorskip("chitchat_dataset")
    shares = {corpus.name: sum(len(text.encode()) for text in corpus) for corpus in mix_corpora(settings, 100_000)}
    assert 10_000 <= shares["primer"] < 11_000 and 90_000 <= shares["chitchat"] < 100_000


# secrets


def test_secrets_of_files_are_never_learned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A piece is text that was read: in spm.vocab, in spm.model, and in every checkpoint and export with it."""
    for name, end in (("a.md", "\n"), ("b.md", "\r\n")):
        lines = ["Rivers and lamps.", "write to secretmail@example.org", "password: zzhunterzz", ""]
        (folder / name).write_bytes((end.join(lines) * 30).encode())
    (folder / "c.md").write_text("Gardens and paper, nothing else. " * 20, encoding="utf-8")
    glob = ("--input_glob", "?.md")
    assert train(*glob, vocab=330) == 0
    assert "masked 120 secrets (60 e-mail, 60 password)" in capsys.readouterr().out
    learned = Path("out/spm.vocab").read_text(encoding="utf-8") + Path("out/spm.model").read_text("latin-1")
    assert not any(part in learned for part in ("secret", "hunter", "zz"))
    assert files.read_json("out/tokenizer_meta.json")["secrets"] == {"e-mail": 60, "password": 60}

    files.write_json(folder / "keep.json", {"data": {"notes": {"secrets": "keep"}}})
    assert train(*glob, "--config", "keep.json", vocab=350) == 0
    assert "secrets" not in capsys.readouterr().out
    assert "secretmail" in Path("out/spm.vocab").read_text(encoding="utf-8")

    files.write_json(folder / "skip.json", {"data": {"notes": {"secrets": "skip"}}})
    assert train(*glob, "--config", "skip.json", vocab=285) == 0
    assert "left out 2 files with 120 secrets" in capsys.readouterr().out
    assert files.read_json("out/tokenizer_meta.json")["input_files"] == ["c.md"]
    assert train("--input_glob", "a.md", "--config", "skip.json") == 1
    assert "every file has secrets in it" in capsys.readouterr().err
