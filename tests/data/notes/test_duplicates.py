"""Duplicates are decided by what the texts say, whatever the hash tables propose."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data.notes import duplicates
from niels_gpt.data.notes.duplicates import Duplicate, find_duplicates, hashed, jaccard, normal_hash, shingles


def found(texts: list[str], threshold: float = 0.8) -> dict[int, Duplicate]:
    return find_duplicates(range(len(texts)), texts.__getitem__, threshold)


def test_case_and_blanks_make_no_difference() -> None:
    assert normal_hash("One  two\nthree ") == normal_hash("one TWO three") != normal_hash("one two, three")


def test_shingles_are_runs_of_words_and_of_characters_where_words_are_not_separated() -> None:
    assert list(shingles("A b, c d!")) == [["a b c", "b c d"]]
    assert list(shingles("今天天气")) == [["今 天 天", "天 天 气"]]
    assert list(shingles("one two")) == [["one two"]] and list(shingles("?")) == []
    assert jaccard(hashed("a b c d"), hashed("a b c e")) == pytest.approx(1 / 3)
    assert jaccard(hashed(""), hashed("!")) == 1.0 and jaccard(hashed(""), hashed("a")) == 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 23])
def test_blocks_miss_no_shingle(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(i) for i in range(n)]
    whole = [" ".join(words[i : i + 3]) for i in range(max(min(n, 1), n - 2))]
    for block in (3, 4, 5, 10):
        monkeypatch.setattr(duplicates, "_BLOCK", block)
        assert [one for part in shingles(" ".join(words)) for one in part] == whole


def test_the_first_stays_and_is_named_by_all() -> None:
    texts = ["a b c d", "x y z w", "A  b c d", "a b c d"]
    assert found(texts) == {2: Duplicate(0, 1.0, True), 3: Duplicate(0, 1.0, True)}
    assert found(["a b c d", "a, b, c d", "a, b, c d"]) == {1: Duplicate(0, 1.0, False), 2: Duplicate(0, 1.0, True)}
    assert found(["a b c d", "a, b, c d"], threshold=1.0) == {}


def brute_force(texts: list[str], threshold: float) -> dict[int, Duplicate]:
    kept: list[int] = []
    dropped: dict[int, Duplicate] = {}
    for i, text in enumerate(texts):
        for j in range(i):
            if normal_hash(texts[j]) == normal_hash(text):
                dropped[i] = Duplicate(dropped[j].of if j in dropped else j, 1.0, True)
                break
        else:
            near = [(j, jaccard(hashed(text), hashed(texts[j]))) for j in kept]
            if near := [(j, s) for j, s in near if s >= threshold]:
                dropped[i] = Duplicate(*near[0], False)
            else:
                kept.append(i)
    return dropped


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_the_outcome_is_that_of_comparing_all_with_all(threshold: float) -> None:
    rng = random.Random(3)
    texts = []
    for _ in range(40):
        words = [str(rng.randrange(500)) for _ in range(rng.randrange(20, 120))]
        for _ in range(rng.randrange(1, 6)):
            texts.append(" ".join(words))
            words = list(words)
            for _ in range(rng.randrange(4)):
                words[rng.randrange(len(words))] = str(rng.randrange(500))
    rng.shuffle(texts)
    wanted = brute_force(texts, threshold)
    assert found(texts, threshold) == wanted
    assert {one.exact for one in wanted.values()} == {True, False}


@given(st.lists(st.text("ab ", max_size=12), max_size=8))
def test_any_texts_can_be_compared(texts: list[str]) -> None:
    assert found(texts) == brute_force(texts, 0.8) == found(texts)
