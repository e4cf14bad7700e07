"""The largest microbatch that works: doubling, then bisection, no size twice. Pure: measuring is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Measured(Protocol):
    """What the search looks at."""

    @property
    def status(self) -> str: ...


def largest_microbatch(measure: Callable[[int], Measured], limit: int) -> int:
    """The largest of the sizes 1..limit that was seen to work, 0 if none does. A size works if its status is ok.

    With an error, which is no matter of size, the search ends; so it does with a timeout: sizes near it would take as
    long to tell no more, and they are seldom the fastest. Half of the largest is measured too, as it often is faster.
    """
    results: dict[int, Measured] = {}

    def works(size: int) -> bool:
        if size not in results:
            results[size] = measure(size)
        return results[size].status == "ok"

    def met(*statuses: str) -> bool:
        return any(result.status in statuses for result in results.values())

    low, size = 0, 1
    while size <= limit and works(size):
        low = size
        if size == limit:
            break
        size = min(2 * size, limit)
    high = size  # fails, unless it is the limit
    while high - low > 1 and not met("error", "timeout"):
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    if low > 1 and not met("error"):
        works(low // 2)
    return low
