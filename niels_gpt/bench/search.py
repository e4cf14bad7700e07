"""The largest microbatch that works: doubling, then bisection, no size twice. Pure: measuring is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Measured(Protocol):
    """What the search looks at."""

    @property
    def status(self) -> str: ...

    @property
    def tokens_per_sec(self) -> float | None: ...


R = TypeVar("R", bound=Measured)


@dataclass(frozen=True)
class Found(Generic[R]):
    """`results` holds every size that was measured, in the order of measuring."""

    results: Mapping[int, R]
    largest: int  # rows of the largest microbatch that works; 0 if not even one row does
    best: int  # rows of the fastest; 0 if none works


def largest_microbatch(measure: Callable[[int], R], limit: int) -> Found[R]:
    """Search sizes 1..limit. A size works if its status is ok; with an error, which is no matter of size, it ends.

    Afterwards half of the largest is measured too: the largest is often not the fastest.
    """
    results: dict[int, R] = {}

    def works(size: int) -> bool:
        if size not in results:
            results[size] = measure(size)
        return results[size].status == "ok"

    def broken() -> bool:
        return any(result.status == "error" for result in results.values())

    low, size = 0, 1
    while size <= limit and works(size):
        low = size
        if size == limit:
            break
        size = min(2 * size, limit)
    high = size  # fails, unless it is the limit
    while high - low > 1 and not broken():
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    if low > 1 and not broken():
        works(low // 2)
    speeds = {size: result.tokens_per_sec or 0.0 for size, result in results.items() if result.status == "ok"}
    best = max(speeds, key=lambda size: (speeds[size], size), default=0)
    return Found(results, low, best)
