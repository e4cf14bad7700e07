"""How the rows of a step are cut: between processes, and smaller where memory is short, they stay the same rows."""

from __future__ import annotations

import pytest

from niels_gpt.train.microbatches import Microbatches


@pytest.mark.parametrize(
    ("size", "count", "world", "expected"),
    [
        (4, 2, 2, (4, 2)),  # as it is cut
        (4, 6, 3, (4, 6)),
        (16, 1, 2, (8, 2)),  # too few microbatches
        (16, 3, 2, (12, 4)),
        (9, 1, 3, (3, 3)),
        (1, 6, 6, (1, 6)),
    ],
)
def test_a_step_is_shared_out(size: int, count: int, world: int, expected: tuple[int, int]) -> None:
    """Every row of every step is computed once, under the number it has in one process."""
    shared = [Microbatches(size, count).shared_out(rank, world) for rank in range(world)]
    assert {(cut.size, cut.count) for cut in shared} == {expected}
    numbered = [piece for cut in shared for piece in cut.of_step(3)]
    assert [number for number, _ in numbered] == list(range(expected[1]))
    rows = [row for cut in shared for _, first in cut.of_step(3) for row in range(first, first + cut.size)]
    assert rows == list(range(3 * size * count, 4 * size * count))


def test_a_step_that_cannot_be_shared_lists_what_fits() -> None:
    with pytest.raises(ValueError, match=r"a step of 8 rows .* 3 processes; start 1, 2, 4, 8 of them"):
        Microbatches(4, 2).shared_out(0, 3)


@pytest.mark.parametrize(
    ("cut", "smaller"),
    [
        (Microbatches(8, 1), Microbatches(4, 2)),
        (Microbatches(5, 2), Microbatches(2, 5)),
        (Microbatches(7, 1), Microbatches(1, 7)),
        (Microbatches(4, 2, 1, 2), Microbatches(2, 4, 1, 2)),
        (Microbatches(3, 2, 0, 2), Microbatches(1, 6, 0, 2)),
        (Microbatches(1, 8), None),
    ],
)
def test_smaller_microbatches_are_the_same_rows(cut: Microbatches, smaller: Microbatches | None) -> None:
    assert cut.smaller() == smaller
    if smaller is not None:
        rows = [[n for _, first in c.of_step(3) for n in range(first, first + c.size)] for c in (cut, smaller)]
        assert rows[0] == rows[1]
