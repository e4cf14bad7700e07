"""From conversations to rows: packed together, or one each, in an order that is a function of the row's number.

Every conversation is read once per epoch. Packing happens once: conversations of a row do not see each other, so only
the order of the rows changes from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from niels_gpt.batching import Batch
from niels_gpt.cache.format import SftExamples
from niels_gpt.epochs import MixedRows, Shuffled
from niels_gpt.model.loss import IGNORED
from niels_gpt.rng import generator_for

OPEN_ROWS = 16  # rows that packing keeps open to find one a conversation fits


class ConversationRows:
    """One source's conversations as rows: a `RowSource` of (3, T+1) arrays of ids, labels and segments.

    packed: rows are filled with whole conversations. Only a conversation longer than a row is cut: its last T+1 tokens
    are kept. Conversations with nothing to learn from are left out; ValueError if that is all of them.
    """

    def __init__(self, source: SftExamples, T: int, seed: int, *, eot_id: int, packed: bool) -> None:
        self.source, self.T, self.eot_id = source, T, eot_id
        stops = np.append(source.idx[1:], len(source.ids))
        lengths = np.minimum(stops - source.idx, T + 1)
        usable = np.flatnonzero(_targets(source, stops - lengths, stops))
        if not len(usable):
            raise ValueError(
                f"{source.name} has no assistant token to learn from; "
                "raise T, so that the ends of long conversations fit, or add conversations"
            )
        generator = generator_for(seed, f"pack/{source.name}")
        order = usable[torch.randperm(len(usable), generator=generator).numpy()]
        self.rows = pack(order.tolist(), lengths.tolist(), T + 1) if packed else [[int(i)] for i in order]
        self.conversations = len(usable)
        self._shuffled = Shuffled(len(self.rows), seed, f"chats/{source.name}")

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, k: int) -> np.ndarray:
        """(3, T+1) int64: the k-th row of a run."""
        return self.arranged(self.rows[self._shuffled.item(k)])

    def arranged(self, numbers: Sequence[int]) -> np.ndarray:
        """(3, T+1) int64: ids, labels and segments of conversations one after another, then padding.

        Segments number the conversations, the padding last. The first label of each is ignored: it is the target of the
        token before, which belongs to another conversation.
        """
        row = np.empty((3, self.T + 1), dtype=np.int64)
        row[:] = [[self.eot_id], [IGNORED], [len(numbers)]]
        start = 0
        for segment, number in enumerate(numbers):
            ids, labels = (part[-(self.T + 1) :] for part in self.source.example(number))
            row[:, start : start + len(ids)] = ids, labels, np.full_like(ids, segment)
            row[1, start] = IGNORED
            start += len(ids)
        return row


def _targets(source: SftExamples, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """How many targets each span holds; its first token is nobody's target."""
    counts = np.zeros(len(starts), dtype=np.int64)
    long = stops - starts > 1
    if long.any():
        bounds = np.stack([starts[long] + 1, stops[long]], axis=1).ravel()
        learnt = np.append(source.labels != IGNORED, False).astype(np.int32)  # reduceat wants every bound inside
        counts[long] = np.add.reduceat(learnt, bounds)[::2]
    return counts


def pack(order: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Conversations in rows of at most `room` tokens: each joins the fullest open row it fits, else it opens one."""
    done: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (tokens left, conversations)
    for number in order:
        fitting = [i for i, (left, _) in enumerate(open_rows) if left >= lengths[number]]
        if fitting:
            best = min(fitting, key=lambda i: open_rows[i][0])
            left, members = open_rows[best]
            members.append(number)
            open_rows[best] = (left - lengths[number], members)
            continue
        if len(open_rows) == OPEN_ROWS:
            done.append(open_rows.pop(min(range(OPEN_ROWS), key=lambda i: open_rows[i][0]))[1])
        open_rows.append((room - lengths[number], [number]))
    return done + [members for _, members in open_rows]


class ChatRows:
    """Rows of a mix of chat sources, as batches; `mix` weighs conversations, whatever their length."""

    def __init__(
        self,
        sources: Mapping[str, SftExamples],
        mix: Mapping[str, float],
        T: int,
        seed: int,
        *,
        eot_id: int,
        packed: bool,
        include_eot: bool = True,
    ) -> None:
        self.eot_id, self.packed, self.include_eot = eot_id, packed, include_eot
        rows = {name: ConversationRows(s, T, seed, eot_id=eot_id, packed=packed) for name, s in sources.items()}
        shares = {name: mix[name] * len(r) / r.conversations for name, r in rows.items()}
        total = sum(shares.values())
        self.mixed = MixedRows(rows, {name: share / total for name, share in shares.items()}, seed)
        self.rows_of_epoch = sum(len(r) for r in rows.values())

    def row(self, n: int) -> np.ndarray:
        """(3, T+1) int64: ids, labels and segments of row n of the run."""
        row = self.mixed.row(n)
        if not self.include_eot:  # here, not in a batch: text among the chats learns where its documents end
            row[1, row[1] == self.eot_id] = IGNORED
        return row

    def batch(self, first: int, rows: int) -> Batch:
        """Rows first .. first + rows - 1 of the run."""
        return self.collate([self.row(n) for n in range(first, first + rows)])

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """x, y and, if packed, segment (B, T) of (3, T+1) rows."""
        ids, labels, segment = torch.from_numpy(np.stack(rows)).unbind(1)
        segments = segment[:, :-1].contiguous() if self.packed else None
        return Batch(ids[:, :-1].contiguous(), labels[:, 1:].contiguous(), segments)


def as_chat_row(tokens: np.ndarray) -> np.ndarray:
    """A window of text (T+1,) in the shape of a row of chats: every token a target, one segment."""
    return np.stack([tokens, tokens, np.zeros_like(tokens)])
