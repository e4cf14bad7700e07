"""Counting text: its tokens and what its caches take, against caches that are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from niels_gpt.plan.recipe import seeded, tuned
from niels_gpt.plan.running import disk_use
from niels_gpt.plan.text import mix_of, read_text
from niels_gpt.settings import validate_overrides
from niels_gpt.train import prepare
from niels_gpt.train.prepare import make_caches, make_tokenizer

VOCABULARY = 1024


def on_primer(folder: Path) -> dict[str, Any]:
    """The recipe on the primer alone, which is read in no time."""
    recipe = seeded(tuned(), 42)
    caches = {key: str(folder / "data" / key) for key in ("pretrain_token_cache", "sft_token_cache")}
    data = {
        **recipe["data"],
        "mix_pretrain": {"primer": 1.0},
        "mix_sft": {"primer": 1.0},
        "val_pretrain_source": "primer",
        "caches": caches,
    }
    tokenizer = {"model_path": str(folder / "tokenizer/spm.model"), "vocab_size": VOCABULARY}
    return {**recipe, "data": data, "tokenizer": tokenizer, "model": {**recipe["model"], "V": VOCABULARY, "T": 64}}


def test_what_was_counted_is_what_the_caches_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = validate_overrides(on_primer(tmp_path))
    said: list[str] = []
    text = read_text(settings, said.append)
    assert said[0] == "counting the text of primer" and len(said) == 4
    assert not any(tmp_path.iterdir())  # a plan makes nothing
    tokens: list[str] = []
    forgotten: list[bool] = []
    monkeypatch.setattr(prepare, "forget_text", lambda: forgotten.append(True))
    tokenizer = make_tokenizer(settings, 42, lambda line: None)
    make_caches(settings, tokenizer, tokens.append)
    assert forgotten
    held = int(tokens[-1].split()[0].replace(",", ""))
    assert text.unique_tokens == pytest.approx(held, rel=0.02)
    built = disk_use([tmp_path / "data"])
    assert text.cache_bytes == pytest.approx(built, rel=0.06)
    assert text.tokenizer_s > 0 and text.caches_s > 0 and text.preparing_bytes > 1e8


def test_a_mix_goes_by_size() -> None:
    mix = mix_of(["text", "primer", "chitchat"], 0.03, {"text": 3.0, "chitchat": 1.0, "primer": 9.0})
    assert mix == pytest.approx({"primer": 0.03, "text": 0.7275, "chitchat": 0.2425})
    assert sum(mix.values()) == pytest.approx(1.0)
    assert mix_of(["primer"], 0.03, {"primer": 5.0}) == {"primer": 1.0}


def test_no_text_is_said(tmp_path: Path) -> None:
    empty = on_primer(tmp_path)
    (tmp_path / "primer.txt").write_text("")
    empty["data"] = {**empty["data"], "primer": {**empty["data"]["primer"], "path": str(tmp_path / "primer.txt")}}
    with pytest.raises((ValueError, OSError), match="primer"):
        read_text(validate_overrides(empty), lambda line: None)
