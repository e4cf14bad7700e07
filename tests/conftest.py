"""What every test shares: one thread, no network, repeatable hypothesis runs, and a tiny tokenizer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: several at once with several threads each are slow
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "niels-gpt-tests-no-hub-cache")  # not the user's

import pytest
import torch
from hypothesis import settings

from niels_gpt.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from tests.chat.models import byte_chat_checkpoint, chat_checkpoint  # noqa: F401  (fixtures)

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the long fault tests (make soak)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: long; runs with --soak only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; make soak runs it"))


_PRIMER = Path(__file__).resolve().parents[1] / "data" / "primer.txt"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """512 pieces trained on the shipped primer; its file is `tiny_tokenizer.model_path`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(train_tokenizer([_PRIMER.read_text(encoding="utf-8")], folder, vocab_size=512))
