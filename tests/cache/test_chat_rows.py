"""Rows of conversations: whole, apart from each other, each once per epoch, and a function of the row's number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.cache.chat_rows import ChatRows, ConversationRows, as_chat_row, pack
from niels_gpt.cache.format import SftExamples, open_sft
from niels_gpt.tokenizer import load_tokenizer
from tests.reference import BUNDLE, needs_bundle

EOT = 6


def stored(lengths: list[int], *, labelled: bool = True, first_id: int = 100, name: str = "stored") -> SftExamples:
    """Conversation i is `lengths[i]` tokens of id first_id+i; every second token is a target."""
    ids = np.concatenate([np.full(n, first_id + i, np.uint16) for i, n in enumerate(lengths)])
    labels = np.where(np.arange(len(ids)) % 2 == 1 if labelled else False, ids.astype(np.int32), -100)
    return SftExamples(ids, labels, np.cumsum([0, *lengths[:-1]]), name)


def test_packed_rows_hold_whole_conversations_apart_from_each_other() -> None:
    lengths = [3, 4, 5, 7, 9] * 8
    source = stored(lengths)
    rows = ConversationRows(source, 20, seed=0, eot_id=EOT, packed=True)
    seen: list[int] = []
    for ids, labels, segment in (rows.row(k).tolist() for k in range(len(rows))):
        starts = [i for i in range(21) if i == 0 or segment[i] != segment[i - 1]]
        assert [segment[i] for i in starts] == list(range(len(starts)))
        for start, stop in zip(starts, [*starts[1:], 21], strict=True):
            if ids[start] == EOT:  # the padding, which is last
                assert stop == 21 and set(labels[start:]) == {-100} and set(ids[start:]) == {EOT}
                continue
            number = ids[start] - 100
            wanted_ids, wanted = source.example(number)
            assert ids[start:stop] == wanted_ids.tolist()  # never cut
            assert labels[start:stop] == [-100, *wanted.tolist()[1:]]  # nothing before predicts into it
            seen.append(number)
    assert sorted(seen) == list(range(40))
    assert sum(lengths) / (21 * len(rows)) > 0.9  # hardly any padding


def test_an_epoch_reads_every_row_once_in_an_order_of_its_own() -> None:
    rows = ConversationRows(stored([9] * 30), 8, seed=0, eot_id=EOT, packed=True)
    epochs = [[int(rows.row(k)[0, 0]) for k in range(e * 30, (e + 1) * 30)] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and len(set(epochs[0])) == 30


def test_a_conversation_longer_than_a_row_keeps_its_end() -> None:
    ids = np.arange(100, 150)
    source = SftExamples(ids.astype(np.uint16), ids.astype(np.int32), np.array([0]), "long")
    batch = ChatRows({"s": source}, {"s": 1.0}, 8, 0, eot_id=EOT, packed=True).batch(0, 3)
    assert batch.x.tolist() == [list(range(141, 149))] * 3 and batch.y.tolist() == [list(range(142, 150))] * 3
    assert batch.segment is not None and not batch.segment.any()


def test_rows_depend_on_their_number_alone() -> None:
    sources = {"a": stored([5] * 40, name="a"), "b": stored([7] * 9, first_id=300, name="b")}

    def make(seed: int) -> ChatRows:
        return ChatRows(sources, {"a": 0.5, "b": 0.5}, 16, seed, eot_id=EOT, packed=True)

    whole, other = make(1).batch(0, 60), make(1)
    for first in (40, 0, 20):
        batch = other.batch(first, 20)
        for name in ("x", "y", "segment"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)[first : first + 20])
    assert not torch.equal(make(2).batch(0, 60).x, whole.x)


def test_the_mix_weighs_conversations_not_their_length() -> None:
    sources = {"short": stored([4] * 50, name="short"), "long": stored([16] * 50, first_id=500, name="long")}
    rows = ChatRows(sources, {"short": 0.5, "long": 0.5}, 15, 0, eot_id=EOT, packed=True)
    x = rows.batch(0, 10_000).x  # a block
    short, long = int(((x >= 100) & (x < 500)).sum()) / 3.75, int((x >= 500).sum()) / 15  # T cuts a row's last token
    assert short / long == pytest.approx(1, abs=0.01)


def test_conversations_without_targets_are_left_out_and_all_of_them_are_an_error() -> None:
    ids = np.arange(100, 130)
    labels = np.where(ids < 110, -100, ids).astype(np.int32)  # the first ten tokens teach nothing
    mixed = SftExamples(ids.astype(np.uint16), labels, np.array([0, 10, 20]), "mixed")
    rows = ConversationRows(mixed, 9, seed=0, eot_id=EOT, packed=False)
    assert sorted(int(rows.row(k)[0, 0]) for k in range(2)) == [110, 120] and len(rows) == 2
    mute = stored([9], labelled=False)
    for packed in (True, False):
        with pytest.raises(ValueError, match="stored has no assistant token to learn from"):
            ConversationRows(mute, 8, seed=0, eot_id=EOT, packed=packed)
    only_first = SftExamples(np.full(4, 9, np.uint16), np.array([9, -100, -100, -100], np.int32), np.array([0]), "f")
    with pytest.raises(ValueError, match="no assistant token"):  # a first token is nobody's target
        ConversationRows(only_first, 8, seed=0, eot_id=EOT, packed=True)


def test_padded_rows_hold_one_conversation() -> None:
    rows = ChatRows({"s": stored([4, 30])}, {"s": 1.0}, 10, 0, eot_id=EOT, packed=False)
    batch = rows.batch(0, 2)
    assert batch.segment is None
    assert {tuple(row) for row in batch.x.tolist()} == {(100, 100, 100, 100, *[EOT] * 6), (101,) * 10}
    short = batch.y[batch.x[:, 0] == 100][0].tolist()
    assert short == [100, -100, 100, *[-100] * 7]


def test_the_end_of_turn_can_be_left_unlearnt() -> None:
    source = SftExamples(np.array([1, 2, EOT], np.uint16), np.array([-100, 2, EOT], np.int32), np.array([0]), "s")
    for include, expected in ((True, [2, EOT]), (False, [2, -100])):
        rows = ChatRows({"s": source}, {"s": 1.0}, 4, 0, eot_id=EOT, packed=True, include_eot=include)
        assert rows.batch(0, 1).y[0, :2].tolist() == expected


def test_text_among_chats_is_one_segment_and_all_target() -> None:
    ids, labels, segment = as_chat_row(np.arange(5))
    assert ids.tolist() == labels.tolist() == [0, 1, 2, 3, 4] and not segment.any()


@given(st.lists(st.integers(1, 33), min_size=1, max_size=80))
def test_packing_keeps_every_conversation_and_never_overfills(lengths: list[int]) -> None:
    rows = pack(list(range(len(lengths))), lengths, 33)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 33 for row in rows)


@needs_bundle
@pytest.mark.parametrize("source", ["dolly15k", "primer"])
def test_reference_rows_but_with_the_end_of_long_conversations(source: str) -> None:
    """Of conversations longer than a row the reference keeps the first T+1 tokens, ours are the last."""
    vectors = np.load(BUNDLE / f"v2/batches/sft_dataset_{source}_seed42_B4_T48.npz")
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    examples = open_sft(
        BUNDLE / "v2/cache/sft", source, "train", tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size
    )
    ours = ConversationRows(examples, 48, 0, eot_id=EOT, packed=False)
    everything = [examples.example(i)[0] for i in range(len(examples))]
    long = 0
    for x, y, y_masked in zip(vectors["x"], vectors["y"], vectors["y_masked"], strict=True):
        beginning = [*x, y[-1]]
        number = next(i for i, ids in enumerate(everything) if [*ids, *[EOT] * 49][:49] == beginning)
        ids, labels, _ = ours.arranged([number])
        if len(everything[number]) <= 49:
            assert ids[:-1].tolist() == x.tolist() and labels[1:].tolist() == y_masked.tolist()
        else:
            long += 1
            assert ids.tolist() == everything[number][-49:].tolist()
    assert long
