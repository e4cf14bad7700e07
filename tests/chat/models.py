"""Two tiny models that have learned three replies by heart (a second each), as fixtures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from niels_gpt.chat_format import format_chat, render
from niels_gpt.checkpoint import save_checkpoint
from niels_gpt.config import NEW, V1, Architecture, ModelConfig
from niels_gpt.data.types import Message
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer

REPLIES = {"hi": "hello ✨ friend", "bye": "see you\nsoon", "say nothing": ""}


def learn(rows: Sequence[tuple[list[int], list[int]]], V: int, T: int, arch: Architecture) -> GPT:
    """A model that has learned rows of (ids, labels) by heart."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(V=V, T=T, C=48, L=1, H=4, d_ff=96, dropout=0.0, rope_theta=10000.0), arch)
    width = max(len(ids) for ids, _ in rows)
    x = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])[:, :-1]
    y = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x, y) / (y != IGNORED).sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    return model.eval()


def write(path: Path, model: GPT, tokenizer: SentencePieceTokenizer | None = None) -> Path:
    save_checkpoint(
        path,
        model_cfg=model.cfg,
        train_cfg={},
        model=model,
        optimizer=None,
        step=100,
        best_val_loss=None,
        tokenizer_model=None if tokenizer is None else tokenizer.model_bytes,
    )
    return path


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A subword model with its tokenizer inside."""
    rows = [
        render(tiny_tokenizer, [Message("user", asked), Message("assistant", said)]) for asked, said in REPLIES.items()
    ]
    return write(tmp_path_factory.mktemp("chat") / "sub.pt", learn(rows, 512, 64, NEW), tiny_tokenizer)


@pytest.fixture(scope="session")
def byte_chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model of the first generation, which goes on as the user after each reply."""
    rows = []
    for asked, said in REPLIES.items():
        prompt = ByteTokenizer().encode(format_chat([Message("user", asked)]))
        reply = ByteTokenizer().encode(f"{said}\nuser: ")
        rows.append((prompt + reply, [IGNORED] * len(prompt) + reply))
    return write(tmp_path_factory.mktemp("chat") / "byte.pt", learn(rows, 256, 64, V1))
