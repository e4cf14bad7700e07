"""Training a tokenizer: the same files from the same text, refusals that name the limit, nothing lost of odd texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from niels_gpt import files, tokenizer
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS
from niels_gpt.tokenizer import load_tokenizer, train_tokenizer
from tests.tokenizer.texts import CONTROL, SNAGS


def test_training_is_deterministic_and_leaves_exactly_three_files(tmp_path: Path) -> None:
    texts = ["one two three four\r\nfive six\n", "seven eight"]
    for folder, batch in (("a", texts), ("b", [texts[0].replace("\r\n", "\n"), texts[1]])):
        path = train_tokenizer(batch, tmp_path / folder, vocab_size=290, sources={"input_files": ["x.txt"]})
        assert path == tmp_path / folder / "spm.model"
    for name in ("spm.model", "spm.vocab", "tokenizer_meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 3
    assert len((tmp_path / "a" / "spm.vocab").read_text(encoding="utf-8").split("\n")) == 290 + 1
    meta = files.read_json(tmp_path / "a" / "tokenizer_meta.json")
    assert meta["special_tokens"] == SPECIAL_TOKEN_IDS
    assert meta["tokenizer_sha256"] == files.sha256_file(path)
    assert (meta["vocab_size"], meta["model_type"], meta["seed"]) == (290, "bpe", 42)
    assert meta["input_files"] == ["x.txt"] and meta["sentencepiece_version"] and len(meta["inputs_sha256"]) == 64


def test_other_text_has_another_hash(tmp_path: Path) -> None:
    hashes = set()
    for texts in (["one two three"], ["one two ", "three"], ["one two thre e"]):
        train_tokenizer(texts, tmp_path, vocab_size=275)
        hashes.add(files.read_json(tmp_path / "tokenizer_meta.json")["inputs_sha256"])
    assert len(hashes) == 3


def test_a_vocabulary_too_big_for_the_text_names_the_largest(tmp_path: Path) -> None:
    text = "one two three four"
    with pytest.raises(ValueError, match=r"vocab_size 5000 is too big.* at most (\d+) pieces") as caught:
        train_tokenizer([text], tmp_path, vocab_size=5000)
    assert list(tmp_path.iterdir()) == []
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert load_tokenizer(train_tokenizer([text], tmp_path, vocab_size=largest)).vocab_size == largest


@pytest.mark.parametrize(
    ("texts", "vocab_size", "model_type", "problem"),
    [
        (["one two three"], 200, "bpe", "vocab_size 200 is too small"),
        (["one two three"], 70_000, "bpe", "65535"),
        (["one two three"], 300, "word", "unknown model_type 'word'"),
        ([], 300, "bpe", "no text"),
        (["", " \n"], 300, "bpe", "no text"),
    ],
)
def test_training_refuses(tmp_path: Path, texts: list[str], vocab_size: int, model_type: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        train_tokenizer(texts, tmp_path, vocab_size=vocab_size, model_type=model_type)
    assert list(tmp_path.iterdir()) == []


def test_training_keeps_the_old_tokenizer_when_the_text_source_fails(tmp_path: Path) -> None:
    path = train_tokenizer(["one two three"], tmp_path, vocab_size=275)
    before = path.read_bytes()

    def texts() -> Iterator[str]:
        yield "four five six"
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        train_tokenizer(texts(), tmp_path, vocab_size=275)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["oneword", "\u2581\u2581x y", "no\x00thing\there \ud800", "a\n\n\n   b\n"])
def test_tokenizers_of_odd_texts_are_lossless(tmp_path: Path, text: str) -> None:
    for model_type in tokenizer.MODEL_TYPES:
        try:
            path = train_tokenizer([text * 40], tmp_path, vocab_size=5000, model_type=model_type)
        except ValueError as error:
            largest = int(str(error).split("at most ")[1].split()[0])
            path = train_tokenizer([text * 40], tmp_path, vocab_size=largest, model_type=model_type)
        tok = load_tokenizer(path, SPECIAL_TOKEN_IDS)
        for sample in (*SNAGS, "  two  blanks \n and \u2581 marks "):
            assert tok.decode(tok.encode(sample)) == sample
            assert CONTROL.isdisjoint(tok.encode(sample))


def test_training_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["one two three four"], tmp_path, vocab_size=280)
    with pytest.raises(ValueError):
        train_tokenizer(["one two three four"], tmp_path, vocab_size=8000)
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_not_skipped(tmp_path: Path) -> None:
    long = "zebra " * 200_000
    tok = load_tokenizer(train_tokenizer([long, "other words here"], tmp_path, vocab_size=280))
    assert len(tok.encode(" zebra")) == 1


def test_digits_stay_apart_and_indentation_does_not(tmp_path: Path) -> None:
    tok = load_tokenizer(
        train_tokenizer(["if x:\n    y = 2024 + 2024\n", "hello world"] * 50, tmp_path, vocab_size=290)
    )
    assert len(tok.encode("2024")) == 4
    assert len(tok.encode("    ")) <= 2
