"""The search for the largest microbatch: right at any limit of memory, and no size is measured twice."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from niels_gpt.bench.search import largest_microbatch


@dataclass(frozen=True)
class Seen:
    status: str


class Allocator:
    """A device of `bytes` memory on which a model takes `fixed` and each row `each`."""

    def __init__(self, memory: int, fixed: int = 0, each: int = 1, fails_as: str = "oom") -> None:
        self.memory, self.fixed, self.each, self.fails_as = memory, fixed, each, fails_as
        self.sizes: list[int] = []

    def measure(self, rows: int) -> Seen:
        self.sizes.append(rows)
        fits = self.fixed + rows * self.each <= self.memory
        return Seen("ok" if fits else self.fails_as)


@pytest.mark.parametrize("seed", range(20))
def test_any_limit_of_memory_gives_the_largest_that_fits_and_no_size_twice(seed: int) -> None:
    rng = random.Random(seed)
    fixed, each, limit = rng.randrange(10**9), rng.randrange(1, 10**8), rng.randrange(1, 600)
    rows = rng.randrange(0, 2 * limit)
    device = Allocator(fixed + rows * each + rng.randrange(each), fixed, each)
    largest = largest_microbatch(device.measure, limit)
    assert largest == min(rows, limit)
    assert len(device.sizes) == len(set(device.sizes)) and max(device.sizes) <= limit
    assert largest <= 1 or largest // 2 in device.sizes  # it may be the faster one


def test_the_first_size_is_one_and_a_limit_that_is_no_power_of_two_is_tried() -> None:
    device = Allocator(10**9)
    assert largest_microbatch(device.measure, 100) == 100
    assert device.sizes == [1, 2, 4, 8, 16, 32, 64, 100, 50]


def test_nothing_fits() -> None:
    device = Allocator(0)
    assert largest_microbatch(device.measure, 256) == 0 and device.sizes == [1]


def test_a_timeout_ends_the_search_as_it_says_nothing_of_memory() -> None:
    device = Allocator(40, fails_as="timeout")
    assert largest_microbatch(device.measure, 256) == 32
    assert device.sizes == [1, 2, 4, 8, 16, 32, 64]  # not 48, 40, 36 ...: 20 s each


def test_a_timeout_between_what_fits_and_what_does_not_ends_the_search() -> None:
    sizes: list[int] = []

    def measure(rows: int) -> Seen:
        sizes.append(rows)
        return Seen("ok" if rows <= 26 else "timeout" if rows <= 28 else "oom")

    assert largest_microbatch(measure, 256) == 24
    assert sizes == [1, 2, 4, 8, 16, 32, 24, 28, 12]  # half of the largest may be the fastest


@pytest.mark.parametrize("broken_at", [1, 4, 3])
def test_an_error_is_no_matter_of_size_and_ends_the_search(broken_at: int) -> None:
    sizes: list[int] = []

    def measure(rows: int) -> Seen:
        sizes.append(rows)
        return Seen("error") if rows == broken_at else Seen("ok") if rows < 4 else Seen("oom")

    assert largest_microbatch(measure, 64) < broken_at and sizes[-1] == broken_at
