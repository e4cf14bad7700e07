"""Two small caches for the tests of formats and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.samples import build_pretrain_cache, build_sft_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    build_pretrain_cache(tmp_path)
    build_sft_cache(tmp_path)
    return tmp_path
