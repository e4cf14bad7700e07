"""The order of the text: complete epochs, an exact mix, and rows that depend on their number alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.batching import TokenStream
from niels_gpt.epochs import BLOCK, Epochs, TextRows, block_quotas

T = 8


def stream(*lengths: int, name: str = "text") -> TokenStream:
    """Arrays of consecutive numbers, so that a window tells where it starts; arrays begin 10,000 apart."""
    return TokenStream([np.arange(n, dtype=np.uint16) + 10_000 * i for i, n in enumerate(lengths)], name)


def starts(epochs: Epochs, epoch: int) -> list[int]:
    n = len(epochs)
    return [int(epochs.row(k)[0]) for k in range(epoch * n, (epoch + 1) * n)]


@pytest.mark.parametrize("lengths", [(100,), (9,), (257, 5, 64, 33)])
def test_an_epoch_reads_every_token_after_its_phase_once(lengths: tuple[int, ...]) -> None:
    epochs = Epochs(stream(*lengths), T, seed=1)
    for epoch in range(3):
        windows = [epochs.row(k) for k in range(epoch * len(epochs), (epoch + 1) * len(epochs))]
        assert all((np.diff(w) == 1).all() and len(w) == T + 1 for w in windows)  # none crosses arrays
        for i, n in enumerate(lengths):
            targets = sorted(int(t) - 10_000 * i for w in windows for t in w[1:] if t // 10_000 == i)
            assert len(targets) == (n - 1) // T * T
            # All but the last window, which may reach back to end with the text, are disjoint.
            assert len(set(targets)) >= len(targets) - T + bool(targets)
            assert not targets or targets[-1] >= n - T


def test_epochs_differ_in_order_and_phase() -> None:
    epochs = Epochs(stream(1000), T, seed=1)
    first, second = starts(epochs, 0), starts(epochs, 1)
    assert first != second
    assert len({s % T for s in first[:-1]} - {(1000 - T - 1) % T}) <= 1
    assert len({tuple(sorted(starts(epochs, e))) for e in range(8)}) > 2
    assert starts(Epochs(stream(1000), T, seed=2), 0) != first


def test_backwards_reads_what_is_unread_first() -> None:
    forwards, backwards = Epochs(stream(1000), T, seed=1), Epochs(stream(1000), T, seed=1, backwards=True)
    assert starts(backwards, 0) == starts(forwards, 0)[::-1]
    assert starts(backwards, 1) == starts(forwards, 1)[::-1]


def test_rows_depend_on_their_number_alone() -> None:
    streams = {"a": stream(500, 90, name="a"), "b": stream(60, name="b")}
    mix = {"a": 0.7, "b": 0.3}
    whole = TextRows(streams, mix, T, seed=3).batch(BLOCK - 20, 40)  # across two blocks
    pieces = TextRows(streams, mix, T, seed=3)
    for first in (BLOCK + 4, BLOCK - 20, BLOCK - 4, BLOCK - 12, BLOCK + 12):  # out of order, as after a resume
        batch = pieces.batch(first, 8)
        at = first - (BLOCK - 20)
        assert torch.equal(batch.x, whole.x[at : at + 8]) and torch.equal(batch.y, whole.y[at : at + 8])
    assert torch.equal(whole.x[:, 1:], whole.y[:, :-1])
    assert not torch.equal(whole.x, TextRows(streams, mix, T, seed=4).batch(BLOCK - 20, 40).x)


def test_a_block_holds_the_mix_exactly_and_epochs_run_on_across_blocks() -> None:
    streams = {name: stream(40 * T + 1, name=name) for name in ("a", "b")}
    streams["b"].arrays[0] = streams["b"].arrays[0] + np.uint16(30_000)
    rows = TextRows(streams, {"a": 0.75, "b": 0.25}, T, seed=0)
    first = rows.batch(0, 2 * BLOCK).x[:, 0].numpy()
    assert [(first[i : i + BLOCK] >= 30_000).sum() for i in (0, BLOCK)] == [2500, 2500]
    from_b = first[first >= 30_000]
    epochs = from_b[: len(from_b) // 40 * 40].reshape(-1, 40)
    assert all(len(set(epoch)) == 40 for epoch in epochs)  # phase 0: this text is a whole number of windows


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=12))
def test_quotas_share_out_a_block(weights: list[float]) -> None:
    quotas = block_quotas(weights)
    assert sum(quotas) == BLOCK and min(quotas) >= 1
    exact = [w / sum(weights) * BLOCK for w in weights]
    assert all(abs(q - e) <= 1 + len(weights) for q, e in zip(quotas, exact, strict=True))


def test_too_short_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="'text' is too short"):
        Epochs(stream(T), T, seed=0)
