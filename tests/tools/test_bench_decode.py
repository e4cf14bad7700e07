"""The decoding benchmark at a tiny shape: every candidate has its turn, and bits per byte are those of the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from niels_gpt.checkpoint import load_model
from niels_gpt.infer.native.decoder import KINDS
from niels_gpt.native.build import compiler
from tools import bench_decode
from tools.bench_common import SHAPES

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def test_the_candidates_take_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(SHAPES, "tiny", {"V": 64, "T": 96, "C": 32, "L": 1, "H": 2, "d_ff": 64, "B": 1})
    assert bench_decode.main(["--shape", "tiny", "--rounds", "1", "--new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    rates = dict(re.findall(r"^\| (.+?) \| (\d+) \| \d+\.\.\d+ \| \d+\.\d\d \|$", said, flags=re.MULTILINE))
    wanted = {bench_decode.REFERENCE, "transformers, static cache", "niels-gpt in PyTorch"}
    assert set(rates) >= wanted | {f"niels-gpt {kind}" for kind in KINDS}
    assert all(int(rate) > 0 for rate in rates.values())


def test_bits_per_byte_are_the_models(
    chat_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello friend, see you soon", encoding="utf-8")
    assert bench_decode.main(["--ckpt", str(chat_checkpoint), "--text", str(text)]) == 0
    shown = re.search(r"^\| fp32 \| (\d+\.\d+) \|", capsys.readouterr().out, flags=re.MULTILINE)
    loaded = load_model(chat_checkpoint, device="cpu")
    ids = torch.tensor([loaded.tokenizer.encode(text.read_text(encoding="utf-8"))])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(loaded.model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
    assert shown is not None
    assert float(shown[1]) == pytest.approx(float(nats) / torch.log(torch.tensor(2.0)).item() / 26, abs=1e-4)
