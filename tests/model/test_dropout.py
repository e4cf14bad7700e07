"""Compiled dropout: the published bits, the rate, the gradient, threads, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from niels_gpt.model.blocks import Dropout
from niels_gpt.model.native import ops
from niels_gpt.native import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def threefry(key: tuple[int, ...], counter: tuple[int, ...]) -> list[int]:
    """Threefry 4x32-20 as the paper has it (Salmon et al. 2011)."""
    turns = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]]
    x = [(c + k) % 2**32 for c, k in zip(counter, keys, strict=False)]
    for n in range(20):
        for a, b, by in ((0, 1, turns[n % 8][0]), (2, 3, turns[n % 8][1])):
            b = b if n % 2 == 0 else 4 - b  # partners change places every other round
            x[a] = (x[a] + x[b]) % 2**32
            x[b] = (x[b] << by | x[b] >> 32 - by) % 2**32 ^ x[a]
        if n % 4 == 3:
            r = n // 4 + 1
            x = [(x[i] + keys[(r + i) % 5] + (r if i == 3 else 0)) % 2**32 for i in range(4)]
    return x


def test_the_published_numbers() -> None:
    """Known answers of Random123."""
    assert threefry((0,) * 4, (0,) * 4) == [0x9C6CA96A, 0xE17EAE66, 0xFC10ECD4, 0x5256A7D8]
    ones = (0xFFFFFFFF,) * 4
    assert threefry(ones, ones) == [0x2A881696, 0x57012287, 0xF6C7446E, 0xA16A6732]


@pytest.mark.parametrize("key", [0, 1, 2**40 + 12345, 2**63 - 2])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_who_is_dropped_is_what_the_bits_say(n: int, key: int) -> None:
    rate, split = 0.3, (key % 2**32, key >> 32, 0, 0)
    found = ops._dropped(torch.ones(n), key, rate)
    bits = [threefry(split, (i // 64 * 16 + i % 16, 0, 0, 0))[i % 64 // 16] for i in range(n)]
    kept = torch.tensor([b >= int(rate * 2**32) for b in bits])
    assert torch.equal(found, torch.where(kept, torch.tensor(1 / (1 - rate)), 0.0))


def test_counters_beyond_32_bits_are_others() -> None:
    x = torch.ones(64)
    assert not torch.equal(ops._dropped(x, 7, 0.5), ops._dropped(x, 7 + 2**32, 0.5))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate(rate: float) -> None:
    torch.manual_seed(3)
    n = 400_000
    share = float((ops.dropout(torch.ones(n), rate) == 0).double().mean())
    assert abs(share - rate) < 4 * (rate * (1 - rate) / n) ** 0.5


def test_neighbours_and_seeds_have_nothing_in_common() -> None:
    torch.manual_seed(3)
    masks = torch.stack([ops.dropout(torch.ones(100_000), 0.5) for _ in range(4)]) - 1
    pairs = [float((masks[a] * masks[b]).mean()) for a in range(4) for b in range(a)]
    pairs += [float((masks[:, :-lag] * masks[:, lag:]).mean()) for lag in (1, 2, 16, 64, 384)]
    assert max(map(abs, pairs)) < 5 / 100_000**0.5


def test_the_gradient_goes_where_the_value_came_from() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(5)
    y = ops.dropout(x, 0.25)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert torch.equal(grad, torch.where(y == 0, 0.0, torch.tensor(2 / 0.75)))
    torch.manual_seed(5)
    assert torch.equal(ops.dropout(x, 0.25), y) and not torch.equal(ops.dropout(x, 0.25), y)


def test_the_same_bits_at_any_number_of_threads_and_of_any_layout() -> None:
    x = torch.randn(90, 1000, generator=torch.Generator().manual_seed(1))

    def dropped(threads: int, x: Tensor) -> Tensor:
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        return ops.dropout(x, 0.1)

    first = dropped(1, x)
    assert all(torch.equal(first, dropped(threads, x)) for threads in (2, 3))
    assert torch.equal(first, dropped(2, x.t().contiguous().t()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    found = ops._dropped(torch.full((1000,), bad), 1, 0.5)  # as 0 x NaN and 0 x infinity
    assert not bool(torch.isfinite(found).any())


def test_the_module() -> None:
    x, layer = torch.ones(64, 64), Dropout(0.5)
    assert layer.eval()(x) is x and Dropout(0.0).train()(x) is x
    layer.train()
    for native in (True, False):
        ops.switch(native)
        torch.manual_seed(2)
        assert 0.4 < float((layer(x) == 0).double().mean()) < 0.6
        assert set(layer(x).unique().tolist()) == {0.0, 2.0}
