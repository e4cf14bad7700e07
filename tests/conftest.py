"""What every test shares: one thread, no network, repeatable hypothesis runs, and a tiny tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest
import torch
from hypothesis import settings

from niels_gpt.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

_PRIMER = Path(__file__).resolve().parents[1] / "data" / "primer.txt"


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """512 pieces trained on the shipped primer; its file is `tiny_tokenizer.model_path`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(train_tokenizer([_PRIMER.read_text(encoding="utf-8")], folder, vocab_size=512))
