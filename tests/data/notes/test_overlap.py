"""Every shared run of the asked length is found; short ones are not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.notes import overlap
from niels_gpt.data.notes.overlap import fingerprints, link


def random_text(rng: random.Random, n: int) -> str:
    return "".join(chr(rng.randrange(33, 0x24F)) for _ in range(n))


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 13, 50, 51]), st.integers(0, 200), st.integers(0, 200))
def test_a_shared_run_is_found_wherever_it_stands(seed: int, run: int, before: int, after: int) -> None:
    rng = random.Random(seed)
    shared = random_text(rng, run).encode()[:run].decode("utf-8", "ignore")
    shared += "." * (run - len(shared.encode()))
    one = random_text(rng, before) + shared + random_text(rng, after)
    other = random_text(rng, after // 2) + shared + random_text(rng, before // 3)
    assert len(np.intersect1d(fingerprints(one, run), fingerprints(other, run)))


def test_runs_shorter_than_k_are_not_found() -> None:
    rng = random.Random(1)
    for _ in range(200):
        shared = "".join(rng.choice("abcdefgh") for _ in range(38))  # and a byte of a neighbour may agree
        one, other = (random_text(rng, 100) + shared + random_text(rng, 100) for _ in range(2))
        assert not len(np.intersect1d(fingerprints(one, 50), fingerprints(other, 50)))


def test_the_blank_line_after_a_document_counts() -> None:
    rng = random.Random(4)
    for _ in range(100):
        shared = "".join(rng.choice("abcdefgh") for _ in range(48))
        one, other = random_text(rng, 40) + shared, f"{random_text(rng, 40)}{shared}\n\n{random_text(rng, 40)}"
        assert len(np.intersect1d(fingerprints(one, 50), fingerprints(other, 50)))


def test_long_texts_are_hashed_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(random.Random(2), 5000)
    whole = fingerprints(text, 50)
    monkeypatch.setattr(overlap, "_BLOCK", 97)
    assert np.array_equal(fingerprints(text, 50), whole)
    assert len(whole) < len(text.encode()) / 4


def test_links_are_followed() -> None:
    prints = [(0, [1, 2]), (1, [3]), (2, [2, 4]), (4, [4, 5]), (5, [])]
    assert link([(i, np.array(found, dtype=np.uint64)) for i, found in prints], 6) == [0, 1, 0, 3, 0, 5]
    assert link([], 2) == [0, 1]
    assert len(fingerprints("short", 50)) == 0
