"""Encoding in blocks: exactly the tokenizer's ids, whatever the workers, the pieces and the memory."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.cache import encode, words
from niels_gpt.cache.encode import Encoder
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from tests.reference import BUNDLE, needs_bundle

PARTS = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\u2581",
    "é",
    "日本語",
    "\ud800",
    "x" * 50,
    ".",
    "12",
    "\t",
    " of",
    "?\n",
    "\u0301",
    "",
]
PRIMER = Path(__file__).resolve().parents[2] / "data" / "primer.txt"


def random_texts(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice(PARTS) for _ in range(draw.randrange(40))) for _ in range(n)]


def documents(tokenizer: Tokenizer, texts: list[str], *, separate: bool = True, workers: int = 1) -> list[list[int]]:
    with Encoder(tokenizer, separate=separate, workers=workers) as encoder:
        blocks = list(encoder.blocks(texts, "x"))
    assert [size for block in blocks for size in block.sizes] == [
        len(t.encode("utf-8", "surrogatepass")) for t in texts
    ]
    return [part.tolist() for block in blocks for part in np.split(block.ids, block.ends[:-1])]


def test_ids_are_those_of_the_tokenizer(
    tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 37)
    monkeypatch.setattr(encode, "INLINE_BATCHES", 3)
    texts = random_texts(1500)
    expected = [[*tiny_tokenizer.encode(text), 6] for text in texts]
    with Encoder(tiny_tokenizer, workers=2) as encoder:
        assert encoder._cutting is not None  # word by word
        list(encoder.blocks(texts, "x"))
        assert encoder._pool is not None and len(encoder._pool._processes) == 2
    assert documents(tiny_tokenizer, texts, workers=2) == expected
    monkeypatch.setattr(words, "MEMORY_TOKENS", 300)
    assert documents(tiny_tokenizer, texts) == expected
    assert documents(tiny_tokenizer, texts, separate=False) == [ids[:-1] for ids in expected]


@given(st.lists(st.text(st.sampled_from("ab .\n\u2581é1"), max_size=30), max_size=8))
def test_any_text_word_by_word(tiny_tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    assert documents(tiny_tokenizer, texts) == [[*tiny_tokenizer.encode(text), 6] for text in texts]


def test_long_texts_are_cut_before_blanks_without_a_change(
    tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARS", 300)
    monkeypatch.setattr(words, "GROUP_CHARS", 1000)
    text = PRIMER.read_text(encoding="utf-8")[:20_000]
    assert documents(tiny_tokenizer, [text, "short", text]) == [
        [*tiny_tokenizer.encode(t), 6] for t in (text, "short", text)
    ]
    run = "abcdefghij" * 200  # nothing to cut before: the ids may differ at a cut, the text does not
    [ids] = documents(tiny_tokenizer, [f"{run} end"])
    assert tiny_tokenizer.decode(ids) == f"{run} end" and ids[-1] == 6


@pytest.mark.parametrize("text", ["", " ", "   ", "a", " a", "a ", "aaaa", "a b c d", "a    b", "ab   cd  ", "    ab"])
def test_pieces_join_to_the_text(text: str) -> None:
    for most in (1, 2, 3, 100):
        parts = list(words.pieces(text, most))
        assert "".join(parts) == text and all(0 < len(part) <= most for part in parts if text)


def test_other_tokenizers_encode_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in random_texts(200, 1) if text]
    unigram = load_tokenizer(
        train_tokenizer([PRIMER.read_text(encoding="utf-8")], tmp_path, vocab_size=600, model_type="unigram")
    )
    with Encoder(unigram) as encoder:
        assert encoder._cutting is None
    assert documents(unigram, texts) == [[*unigram.encode(text), 6] for text in texts]
    whole = documents(ByteTokenizer(), texts)
    assert whole == [list(ByteTokenizer().encode(text + "\n\n")) for text in texts]
    assert documents(ByteTokenizer(), texts, separate=False) == [ByteTokenizer().encode(text) for text in texts]


@needs_bundle
def test_published_tokenizers_keep_their_blanks_where_a_long_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    assert tokenizer.drops_leading_blanks
    monkeypatch.setattr(encode, "WHOLE_CHARS", 200)
    monkeypatch.setattr(words, "GROUP_CHARS", 500)
    text = " ".join(PRIMER.read_text(encoding="utf-8").split())[:5000]
    assert documents(tokenizer, [text, text], separate=False) == [tokenizer.encode(text)] * 2


def test_known_texts_are_not_encoded(tiny_tokenizer: SentencePieceTokenizer) -> None:
    texts = ["one text", "another", "", "one text"]
    known = {hashlib.sha256(b"one text").digest()[:16]: np.array([9, 9, 9], dtype=np.uint16)}
    with Encoder(tiny_tokenizer) as encoder:
        [block] = encoder.blocks(texts, "x", lookup=known.get)
    parts = [part.tolist() for part in np.split(block.ids, block.ends[:-1])]
    assert parts == [[9, 9, 9], [*tiny_tokenizer.encode("another"), 6], [6], [9, 9, 9]]
    assert block.reused == 2 and block.digests[0] == next(iter(known)) and len(block) == 4


@pytest.mark.parametrize("literal", SPECIAL_TOKENS.values())
def test_a_sentinel_in_a_text_is_an_error_that_names_it(tiny_tokenizer: SentencePieceTokenizer, literal: str) -> None:
    with Encoder(tiny_tokenizer) as encoder, pytest.raises(ValueError, match=r"special token literal.*notes.*12"):
        list(encoder.blocks(["fine", "fine", f"a {literal}"], "notes", first=10))


def test_a_worker_that_dies_is_an_error_in_words(
    tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(encode, "INLINE_BATCHES", 0)
    with (
        Encoder(tiny_tokenizer, workers=2) as encoder,
        pytest.raises(RuntimeError, match=r"worker process .* ended with status -9.*--workers 1"),
    ):
        for n, _ in enumerate(encoder.blocks(random_texts(1000), "x")):
            if n == 3 and encoder._pool:
                for process in encoder._pool._processes:
                    process.kill()


def test_a_worker_needs_no_torch() -> None:
    code = "import sys; import niels_gpt.cache.words; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
