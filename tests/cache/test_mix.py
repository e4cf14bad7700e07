"""Mixes of pretraining caches: weights, what may be missing, and errors that name all that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from niels_gpt.cache.pretrain import open_mix
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.cache.samples import build, settings_for, write_notes


@pytest.fixture
def mixed(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    write_notes(tmp_path / "text")
    build(settings_for(tmp_path), tiny_tokenizer, "text")
    build(settings_for(tmp_path), tiny_tokenizer, "primer")
    return tmp_path


def test_a_mix_opens_with_its_weights(mixed: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    settings = settings_for(mixed, {"text": 0.25, "primer": 0.75}, val_pretrain_source="primer")
    for split in ("train", "val"):
        streams, p = open_mix(settings, tiny_tokenizer, split, 32)
        assert p == {"primer": 0.75, "text": 0.25} and all(s.num_tokens for s in streams.values())


def test_the_validation_source_need_not_be_in_the_mix(mixed: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    settings = settings_for(mixed, {"text": 1.0}, val_pretrain_source="primer")
    assert open_mix(settings, tiny_tokenizer, "train", 32)[1] == {"text": 1.0}
    assert open_mix(settings, tiny_tokenizer, "val", 32)[1] == {"primer": 0.0, "text": 1.0}


def write_stub(root: Path, tokenizer: SentencePieceTokenizer) -> None:
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (root / split / "shard_00000.bin").touch()
    ids = tokenizer.special_token_ids()
    meta = {"stub": True, "train_tokens": 0, "val_tokens": 0, "tokenizer_sha256": tokenizer.sha256}
    (root / "meta.json").write_text(json.dumps({**meta, "special_token_ids": ids, "vocab_size": 512}))


@pytest.mark.parametrize("stub", [False, True])
def test_a_missing_optional_source_is_left_out_loudly(
    mixed: Path, tiny_tokenizer: SentencePieceTokenizer, stub: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if stub:
        write_stub(mixed / "cache" / "pretrain" / "roam", tiny_tokenizer)
    settings = settings_for(mixed, {"text": 0.6, "primer": 0.2, "roam": 0.2}, val_pretrain_source="primer")
    for split in ("train", "val"):
        streams, p = open_mix(settings, tiny_tokenizer, split, 32)
        assert sorted(streams) == ["primer", "text"] and p == pytest.approx({"text": 0.75, "primer": 0.25})
        assert "warning: roam is left out" in capsys.readouterr().err


def test_other_missing_sources_are_errors_that_name_all(mixed: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    mix = {"text": 0.5, "wikitext": 0.25, "fineweb_edu": 0.25}
    with pytest.raises(FileNotFoundError) as caught:
        open_mix(settings_for(mixed, mix), tiny_tokenizer, "train", 32)
    for name in ("wikitext", "fineweb_edu"):
        assert f"cache.cli build {name} --phase pretrain --cache-dir {mixed / 'cache'}" in str(caught.value)


def test_a_mix_without_anything_or_without_its_validation_source_is_an_error(
    mixed: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    settings = settings_for(mixed, {"roam": 1.0}, val_pretrain_source="roam")
    with pytest.raises(ValueError, match=r"no source of data\.mix_pretrain has any text: roam"):
        open_mix(settings, tiny_tokenizer, "train", 32)
    settings = settings_for(mixed, {"roam": 0.5, "text": 0.5}, val_pretrain_source="roam")
    with pytest.raises(ValueError, match=r"validation source roam has no validation text; .* such as text"):
        open_mix(settings, tiny_tokenizer, "val", 32)


def test_a_source_too_short_for_the_context_is_an_error(mixed: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    settings = settings_for(mixed, {"text": 0.5, "primer": 0.5}, val_pretrain_source="primer")
    with pytest.raises(ValueError, match=r"'text' is too short: .*T\+1 = 20001 needed; lower T"):
        open_mix(settings, tiny_tokenizer, "train", 20_000)
