"""Windows, mixes and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from niels_gpt.batching import TokenStream, check_mix, get_batch
from niels_gpt.rng import generator_for
from tests.reference import BUNDLE, needs_bundle

SOURCES = {"a": bytes(range(100)), "b": bytes(range(100, 200))}
MIX = {"a": 0.7, "b": 0.3}


def batch(seed: int = 1, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    given = {"p": MIX, "B": 6, "T": 8, "device": "cpu", **changes}
    return get_batch(SOURCES, generator=torch.Generator().manual_seed(seed), **given)  # type: ignore[arg-type]


def test_targets_are_the_next_tokens() -> None:
    x, y = batch()
    assert x.shape == y.shape == (6, 8) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the sources count upwards
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    first = batch(5)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, batch(5), strict=True))
    assert not torch.equal(first[0], batch(6)[0])


def test_weights_are_respected() -> None:
    x, _ = batch(B=4000)
    assert float((x[:, 0] < 100).float().mean()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(
    ("p", "words"),
    [
        ({"a": 1.0}, "b are missing from p"),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, "c, missing from sources"),
        ({"a": 0.5, "b": 0.4}, "must sum to 1.0, not 0.9"),
        ({"a": 0.5, "b": float("nan")}, "must sum to 1.0"),
    ],
)
def test_bad_mixes_are_named(p: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch(p=p)


def test_short_sources_are_named_with_their_length() -> None:
    with pytest.raises(ValueError, match=r"'a' is too short: 100 tokens, at least T\+1 = 101 needed"):
        batch(T=100)
    x, y = batch(T=99)  # exactly T+1 tokens: one window
    assert sorted({int(v) for v in x[:, 0]}) in ([0], [100], [0, 100]) and torch.equal(y, x + 1)


def test_windows_never_cross_arrays() -> None:
    stream = TokenStream([np.arange(20, dtype=np.uint16), np.arange(3, dtype=np.uint16), np.arange(1000, 1030)], "s")
    assert stream.num_tokens == 53 and stream.windows(8) == [12, 0, 22]
    starts = set()
    for i in range(400):
        window = stream.draw(8, generator_for(1, "test", i))
        assert window.dtype == np.int64 and np.array_equal(np.diff(window), np.ones(8))
        starts.add(int(window[0]))
    assert starts == {*range(12), *range(1000, 1022)}  # every window, also the last of each array


def test_check_mix_accepts_rounding() -> None:
    check_mix(["a", "b", "c"], {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


@needs_bundle
def test_published_byte_batches() -> None:
    streams = {name: (BUNDLE / f"v2/batches/stream_{name}.bin").read_bytes() for name in ("wiki", "roam", "primer")}
    mix = {"wiki": 0.72, "roam": 0.18, "primer": 0.10}
    x, y = get_batch(streams, mix, 8, 24, "cpu", torch.Generator().manual_seed(42))
    recorded = np.load(BUNDLE / "v2/batches/byte_get_batch_seed42_B8_T24.npz")
    assert np.array_equal(recorded["x"], x.numpy()) and np.array_equal(recorded["y"], y.numpy())
