"""What is made before training's clock starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from niels_gpt.settings import validate_overrides
from niels_gpt.tokenizer import SentencePieceTokenizer, corpus
from niels_gpt.train import prepare

MEGABYTE = 10**6


@pytest.mark.parametrize(("wanted", "device", "built"), [(True, "cpu", 2), (False, "cpu", 0)])
def test_kernels_are_compiled_where_they_will_be_used(
    wanted: bool, device: str, built: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(prepare.native, "missing", lambda: calls.append("training"))
    monkeypatch.setattr(prepare.decoder, "missing", lambda: calls.append("decoding"))
    settings = validate_overrides({"training": {"native_kernels": wanted}})
    prepare.compile_kernels(settings, device, Console(quiet=True))
    assert len(calls) == built


class Enough(Exception):
    """What was to be seen has been seen."""


def test_the_tokenizer_reads_50_mb_of_a_mix_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    read = {"wikitext": 0, "primer": 0}

    def get_source(name: str) -> SimpleNamespace:
        def documents(settings: object, split: str) -> Iterator[SimpleNamespace]:
            for _ in range(60):
                read[name] += 1
                yield SimpleNamespace(text="abc " * (MEGABYTE // 4))

        return SimpleNamespace(name=name, documents=documents, stream=None, describe=lambda settings, phase: {})

    def train_tokenizer(texts: Iterable[str], *arguments: object, **more: object) -> None:
        assert sum(len(text) for text in texts) == 50 * MEGABYTE
        raise Enough

    monkeypatch.setattr(corpus, "get_source", get_source)
    monkeypatch.setattr(prepare, "get_source", get_source)
    monkeypatch.setattr(prepare, "train_tokenizer", train_tokenizer)
    settings = validate_overrides({"data": {"mix_pretrain": {"wikitext": 0.9, "primer": 0.1}}})
    with pytest.raises(Enough):
        prepare.make_tokenizer(settings, 42, lambda text: None)
    assert read == {"wikitext": 45, "primer": 5}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"sources": 1}'])
def test_a_tokenizer_whose_record_cannot_be_read_is_made_anew(
    content: bytes, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_tokenizer(*arguments: object, **more: object) -> None:
        raise Enough

    monkeypatch.setattr(prepare, "train_tokenizer", train_tokenizer)
    assert tiny_tokenizer.model_path is not None
    model = tmp_path / "spm.model"
    model.write_bytes(tiny_tokenizer.model_path.read_bytes())
    model.with_name("tokenizer_meta.json").write_bytes(content)
    settings = validate_overrides({"tokenizer": {"model_path": str(model)}, "data": {"mix_pretrain": {"primer": 1.0}}})
    with pytest.raises(Enough):
        prepare.make_tokenizer(settings, 42, lambda text: None)
