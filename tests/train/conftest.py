"""A built world for every test of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.train import workshop


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Overrides for a built world; the test runs inside its folder."""
    workshop.build_caches(tmp_path, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    return workshop.overrides(tmp_path, tiny_tokenizer)
