"""The tokenizer report: every figure against a count by hand, the lines, the table, JSON, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from niels_gpt.tokenizer.corpus import Corpus
from niels_gpt.tokenizer.report import main, measure
from tests.reference import BUNDLE, needs_bundle

TEXT = "What is your name?\nMy name is niels. \u4f60\u597d caf\u00e9\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "some.txt"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_figures_are_counts(tiny_tokenizer: SentencePieceTokenizer) -> None:
    ids = tiny_tokenizer.encode(TEXT)
    found = measure(tiny_tokenizer, [Corpus("t", lambda: iter([TEXT, TEXT]))])
    assert found["t"].report() == found["combined"].report()
    report = found["combined"].report()
    assert report["tokens"] == 2 * len(ids) and report["chars"] == 2 * len(TEXT) and report["texts"] == 2
    assert report["bytes"] == 2 * len(TEXT.encode()) and report["words"] == 2 * len(TEXT.split())
    assert report["tokens_per_byte"] == pytest.approx(len(ids) / len(TEXT.encode()))
    assert report["bytes_per_token"] == pytest.approx(len(TEXT.encode()) / len(ids))
    assert report["tokens_per_char"] == pytest.approx(len(ids) / len(TEXT))
    assert report["tokens_per_word"] == pytest.approx(len(ids) / len(TEXT.split()))
    fallback = sum(1 for i in ids if 7 <= i < 263)
    assert report["byte_fallback_tokens"] == 2 * fallback >= 2 * 8  # two ideographs and an accent at least
    assert report["unknown_tokens"] == report["lossy_texts"] == 0
    assert report["pieces_used"] == len(set(ids))
    top = report["top"][0]
    assert top["count"] == 2 * max(ids.count(i) for i in ids) == 2 * ids.count(top["id"])
    assert top["piece"] == tiny_tokenizer.piece(top["id"])


def test_inputs_add_up(tiny_tokenizer: SentencePieceTokenizer) -> None:
    parts = [Corpus("a", lambda: iter([TEXT] * 300)), Corpus("b", lambda: iter(["", "b b"]))]
    for tokenizer in (tiny_tokenizer, ByteTokenizer()):
        found = {name: one.report() for name, one in measure(tokenizer, parts).items()}
        for key in ("texts", "tokens", "chars", "bytes", "words", "byte_fallback_tokens"):
            assert found["combined"][key] == found["a"][key] + found["b"][key], key
        assert found["a"]["texts"] == 300


def test_sentinels_are_counted_as_ids_and_as_text(tiny_tokenizer: SentencePieceTokenizer) -> None:
    texts = [SPECIAL_TOKENS["eot"] * 2, f"a {SPECIAL_TOKENS['usr']} b"]
    report = measure(tiny_tokenizer, [Corpus("t", lambda: iter(texts))])["t"].report()
    assert report["sentinel_literals"] == {"sys": 0, "usr": 1, "asst": 0, "eot": 2}
    assert report["sentinel_tokens"] == dict.fromkeys(SPECIAL_TOKENS, 0)


def test_nothing_to_divide_by(tiny_tokenizer: SentencePieceTokenizer) -> None:
    report = measure(tiny_tokenizer, [Corpus("t", lambda: iter([]))])["combined"].report()
    assert report["tokens"] == 0 and report["tokens_per_byte"] is None and report["top"] == []


@needs_bundle
def test_tokenizers_that_lose_text_are_found() -> None:
    published = load_tokenizer(BUNDLE / "v2" / "tokenizer" / "spm.model")
    texts = ["plain text", "two  blanks", "a\nline"]
    assert measure(published, [Corpus("t", lambda: iter(texts))])["t"].report()["lossy_texts"] == 2


def test_lines(tiny_tokenizer: SentencePieceTokenizer, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_tokenizer.model_path)
    out = run(capsys, "--tokenizer", path, "--text-file", file, "--text-file", file)
    n = len(tiny_tokenizer.encode(TEXT))  # line ends are read as LF
    line = next(line for line in out.splitlines() if line.startswith("[combined] "))
    assert line.startswith(f"[combined] tokens={n} chars={len(TEXT)} tokens/char={n / len(TEXT):.4f} unk%=0.000 ")
    assert f"[{file}] tokens={n} " in out and "specials: sys=0 " in out and "top 20 ids:" in out
    assert "512 pieces" in out and "│" not in out


def test_several_side_by_side(
    tiny_tokenizer: SentencePieceTokenizer, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny_tokenizer.model_path)
    out = run(capsys, "--tokenizer", path, "--tokenizer", "byte", "--text-file", file)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows if row[0] == "combined"] == [
        ["combined", path, "512"],
        ["combined", "byte", "256"],
    ]
    assert rows[-1][3:6] == [str(len(TEXT.encode())), "1.0000", "1.0000"]


def test_json(tiny_tokenizer: SentencePieceTokenizer, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_tokenizer.model_path)
    out = run(capsys, "--tokenizer", path, "--tokenizer", "byte", "--text-file", file, "--source", "primer", "--json")
    found = json.loads(out)
    assert list(found) == [path, "byte"] and found[path]["sha256"] == tiny_tokenizer.sha256
    assert found["byte"]["primer"]["tokens_per_byte"] == 1.0
    combined = found[path]["combined"]
    assert combined["tokens"] == found[path][file]["tokens"] + found[path]["primer"]["tokens"]
    assert combined["tokens_per_byte"] < 0.7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name some text: --text-file FILE"),
        (["--text-file", "nowhere.txt"], "there is no text file nowhere.txt"),
        (["--source", "nonsense"], "unknown source 'nonsense'"),
        (["--tokenizer", "nowhere/spm.model", "--source", "primer"], "there is no tokenizer model nowhere/spm.model"),
    ],
)
def test_errors(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokenizer", "byte", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and words in said.err
