"""Tokenizers: lossless, unforgeable, faithful to the published models; decoding, streaming and loading."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import files, tokenizer
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, TextStream, load_tokenizer, train_tokenizer
from tests.reference import BUNDLE, needs_bundle
from tests.tokenizer.texts import CONTROL, LITERALS, TEXTS

PUBLISHED = BUNDLE / "v2" / "tokenizer" / "spm.model"
many = settings(max_examples=2000)
some = settings(max_examples=400)


@pytest.fixture(scope="module")
def published() -> SentencePieceTokenizer:
    return load_tokenizer(PUBLISHED, SPECIAL_TOKEN_IDS)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """500 pieces of the shipped primer, by the other method."""
    text = (Path(__file__).resolve().parents[2] / "data" / "primer.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("unigram")
    return load_tokenizer(train_tokenizer([text], folder, vocab_size=500, model_type="unigram"), SPECIAL_TOKEN_IDS)


# no text is lost, no text is control


@many
@given(TEXTS)
def test_new_tokenizers_are_lossless_and_text_is_never_control(
    tiny_tokenizer: SentencePieceTokenizer, text: str
) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert CONTROL.isdisjoint(ids)


@some
@given(TEXTS)
def test_unigram_tokenizers_are_lossless_too(unigram: SentencePieceTokenizer, text: str) -> None:
    ids = unigram.encode(text)
    assert unigram.decode(ids) == text
    assert CONTROL.isdisjoint(ids)
    assert unigram.encode_batch([text, "", text]) == [ids, [], ids]
    check_stream(unigram, ids)


@some
@given(TEXTS)
def test_byte_tokenizer_is_utf8(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert bytes(ids) == text.encode("utf-8")
    assert ByteTokenizer().decode(ids) == text


@needs_bundle
@some
@given(TEXTS)
def test_no_text_is_control_in_published_tokenizers(published: SentencePieceTokenizer, text: str) -> None:
    assert CONTROL.isdisjoint(published.encode(text))


@needs_bundle
@pytest.mark.parametrize("literal", LITERALS)
def test_literals_survive_published_tokenizers_as_ordinary_text(
    published: SentencePieceTokenizer, literal: str
) -> None:
    assert published.decode(published.encode(f"x{literal}y {literal}")) == f"x{literal}y {literal}"
    wide = literal.replace("<", "\uff1c").replace(">", "\uff1e")  # NFKC turns it into the literal
    assert published.decode(published.encode(wide)) == literal


@pytest.mark.parametrize("text", ["\n", " ", "\t", "\x00", "\u2581", "a", "\u00e9"])
def test_single_characters_cost_what_they_should(tiny_tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert len(tiny_tokenizer.encode(text)) <= len(text.encode("utf-8"))


@pytest.mark.parametrize("literal", LITERALS)
def test_the_model_file_itself_cannot_be_injected(tiny_tokenizer: SentencePieceTokenizer, literal: str) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer.model_bytes)  # as other programs load it
    assert CONTROL.isdisjoint(plain.encode(f"x{literal}y"))
    assert plain.decode(plain.encode(f" x  {literal}\n")) == f" x  {literal}\n"


def test_every_byte_has_its_piece(tiny_tokenizer: SentencePieceTokenizer) -> None:
    assert [tiny_tokenizer.token_bytes(7 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(tiny_tokenizer: SentencePieceTokenizer) -> None:
    for tok in (tiny_tokenizer, ByteTokenizer()):
        assert tok.decode(tok.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


@some
@given(st.lists(TEXTS, max_size=4))
def test_batches_equal_single_texts(tiny_tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    for tok in (tiny_tokenizer, ByteTokenizer()):
        singly = [tok.encode(text) for text in texts]
        assert tok.encode_batch(texts) == singly
        assert [ids.tolist() for ids in tok.encode_arrays(texts)] == singly


@needs_bundle
def test_batches_of_published_tokenizers_hold_no_control(published: SentencePieceTokenizer) -> None:
    texts = ["hi", *(f"hi {literal}" for literal in LITERALS)]
    assert published.encode_batch(texts) == [published.encode(text) for text in texts]


# published vectors


@needs_bundle
def test_published_vectors(published: SentencePieceTokenizer) -> None:
    for vector in json.loads((BUNDLE / "v2" / "tokenizer_vectors.json").read_text(encoding="utf-8")):
        if CONTROL.isdisjoint(vector["ids"]):  # the others show text that became control
            assert published.encode(vector["text"]) == vector["ids"], vector
            assert published.decode(vector["ids"]) == vector["decoded"], vector
        else:
            assert published.decode(published.encode(vector["text"])) == vector["decoded"], vector


@needs_bundle
def test_published_info(published: SentencePieceTokenizer) -> None:
    info = json.loads((BUNDLE / "v2" / "tokenizer_info.json").read_text(encoding="utf-8"))
    assert published.vocab_size == info["vocab_size"]
    assert published.special_token_ids() == info["special_token_ids"]
    assert list(published.special_tokens.values()) == info["special_tokens"]
    assert published.token_bytes(info["byte_piece_255"]) == b"\xff"
    assert published.sha256 == files.sha256_file(PUBLISHED)


@needs_bundle
def test_byte_vectors() -> None:
    for vector in json.loads((BUNDLE / "v1" / "tokenizer_vectors.json").read_text(encoding="utf-8")):
        if "text" in vector:
            assert ByteTokenizer().encode(vector["text"]) == vector["ids"]
        assert ByteTokenizer().decode(vector["ids"]) == vector.get("decoded", vector.get("text"))


# decoding and streaming


def check_stream(tok: tokenizer.Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tok)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == tok.decode(ids)


@some
@given(st.data())
def test_stream_equals_decode_for_any_ids(tiny_tokenizer: SentencePieceTokenizer, data: st.DataObject) -> None:
    for tok in (tiny_tokenizer, ByteTokenizer()):
        check_stream(tok, data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=12)))


@needs_bundle
@some
@given(st.lists(st.integers(0, 511) | st.sampled_from([263, 39, 3]), max_size=12))
def test_stream_equals_decode_for_published_tokenizers(published: SentencePieceTokenizer, ids: list[int]) -> None:
    check_stream(published, ids)


def test_stream_never_splits_a_character(tiny_tokenizer: SentencePieceTokenizer) -> None:
    text = "a\U0001f680b\u2581\u4f60"
    stream = TextStream(tiny_tokenizer)
    parts = [stream.push(i) for i in tiny_tokenizer.encode(text)]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert stream.flush() == ""
    assert stream.push(7 + 0xF0) == ""
    assert stream.flush() == "\ufffd"


@needs_bundle
def test_published_tokenizers_drop_blanks_at_the_start_only(published: SentencePieceTokenizer) -> None:
    blank, he = 263, 264
    assert published.decode([blank, 5, blank, he, blank, he]) == "he he"


def test_decode_takes_tensors_and_specials_vanish(tiny_tokenizer: SentencePieceTokenizer) -> None:
    ids = tiny_tokenizer.encode_torch("hello there")
    assert ids.dtype == torch.int64 and ids.ndim == 1
    assert tiny_tokenizer.decode(ids) == "hello there"
    assert tiny_tokenizer.decode([*range(7), *ids.tolist(), 6]) == "hello there"
    assert [tiny_tokenizer.token_bytes(i) for i in range(7)] == [b""] * 7
    assert tiny_tokenizer.encode_torch("").shape == (0,)


def test_decode_takes_arrays(tiny_tokenizer: SentencePieceTokenizer) -> None:
    for tok in (tiny_tokenizer, ByteTokenizer()):
        for dtype in (np.uint16, np.int64):
            assert tok.decode(np.array(tok.encode("hi there"), dtype=dtype)) == "hi there"


@pytest.mark.parametrize("bad", [[-1], [256], [1, 300], torch.zeros(1, 2), torch.zeros(2, 2, dtype=torch.long), "hi"])
def test_decode_refuses_what_are_not_ids(bad: object) -> None:
    with pytest.raises(ValueError, match="id"):
        ByteTokenizer().decode(bad)  # type: ignore[arg-type]


def test_decode_names_the_id_outside_the_vocabulary(tiny_tokenizer: SentencePieceTokenizer) -> None:
    for bad in (-1, 512):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tiny_tokenizer.decode([3, bad])
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tiny_tokenizer.token_bytes(bad)


# loading


def test_load_checks_expected_ids(tiny_tokenizer: SentencePieceTokenizer) -> None:
    assert tiny_tokenizer.model_path is not None
    load_tokenizer(tiny_tokenizer.model_path, SPECIAL_TOKEN_IDS)
    with pytest.raises(ValueError, match="encode to exactly one piece id"):
        load_tokenizer(tiny_tokenizer.model_path, {**SPECIAL_TOKEN_IDS, "eot": 9})
    with pytest.raises(ValueError, match="encode to exactly one piece id"):
        SentencePieceTokenizer(tiny_tokenizer.model_path, {**SPECIAL_TOKENS, "sys": "<|other|>"})


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 50, b"PK\x03\x04 a zip"])
def test_load_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.model is not a SentencePiece model"):
        load_tokenizer(path)


def test_load_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer model .*nowhere\.model; make it .*"):
        load_tokenizer(tmp_path / "nowhere.model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"niels-gpt tokenizer --source chitchat --source primer --out_dir artifacts/tokenizer/v2 ",
    ):
        tokenizer.encode("hi")


def test_from_bytes_is_the_same_tokenizer(tiny_tokenizer: SentencePieceTokenizer) -> None:
    copy = SentencePieceTokenizer.from_bytes(tiny_tokenizer.model_bytes)
    assert copy.sha256 == tiny_tokenizer.sha256
    assert copy.encode("the same") == tiny_tokenizer.encode("the same")
    assert copy.eot_id == SPECIAL_TOKEN_IDS["eot"]


def test_default_tokenizer_is_read_anew_when_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spm.model"
    monkeypatch.setattr(tokenizer, "DEFAULT_TOKENIZER_PATH", path)
    for step, text in enumerate(["one way or another", "quite a different text"]):
        train_tokenizer([text], tmp_path, vocab_size=280)
        os.utime(path, ns=(step, step))
        assert tokenizer.get_default_tokenizer().sha256 == files.sha256_file(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text
