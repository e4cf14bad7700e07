"""Many prompts at once get the replies that each gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from niels_gpt.infer.batch import greedy_replies, shared_beginning
from niels_gpt.infer.engine import Engine
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import stream_steps
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import ByteTokenizer
from tests.varied import random_ids, varied_model

GREEDY = Sampling(temperature=0.0)


def alone(model: GPT, prompt: list[int], n: int, stop_ids: set[int], banned: tuple[int, ...]) -> list[int]:
    n = min(n, model.cfg.T - len(prompt))
    steps = stream_steps(
        model, prompt, max_new_tokens=n, sampling=GREEDY, stop_ids=stop_ids, banned_ids=banned, native=False
    )
    return [step.token_id for step in steps if step.token_id not in stop_ids]


def test_lengths_stops_and_bans() -> None:
    model = varied_model().train()
    prompts = [random_ids(n, 61, seed=i) for i, n in enumerate((1, 5, 5, 5, 9, 1, 30, 32, 5))]
    free = greedy_replies(model, prompts, max_new_tokens=12, stop_ids=set())
    assert free == [alone(model, p, 12, set(), ()) for p in prompts]
    assert [len(r) for r in free] == [12, 12, 12, 12, 12, 12, 2, 0, 12]
    assert len({token for reply in free for token in reply}) > 12
    stop, banned = {free[1][3]}, (free[2][0],)
    stopped = greedy_replies(model, prompts, max_new_tokens=12, stop_ids=stop, banned_ids=banned, max_rows=2)
    assert stopped == [alone(model, p, 12, stop, banned) for p in prompts]
    assert any(0 < len(r) < 12 for r in stopped[:6]) and not any(banned[0] in r for r in stopped)
    assert model.training


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("native", [True, False])
def test_what_all_prompts_begin_with_is_read_once(rows: int, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, beginning, read = varied_model(), random_ids(9, 61, seed=1), []
    whole, one_pass = Engine.__init__, Engine._pass

    def engine(self: Engine, *args: Any, **options: Any) -> None:
        whole(self, *args, **options, native=native)

    def counted(self: Engine, row: int, ids: Sequence[int], start: int, watch: None) -> Any:
        read.append(len(ids))
        return one_pass(self, row, ids, start, watch)

    prompts = [beginning + random_ids(n, 61, seed=n) for n in (3, 5, 1, 8, 12)]
    expected = [alone(model, p, 10, set(), ()) for p in prompts]
    monkeypatch.setattr(Engine, "__init__", engine)
    monkeypatch.setattr(Engine, "_pass", counted)
    assert greedy_replies(model, prompts, max_new_tokens=10, stop_ids=set(), max_rows=rows) == expected
    assert read[0] == 9 and max(read[1:], default=1) == 1
    assert len({token for reply in expected for token in reply}) > 10


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4, 5]], [1, 2]),
        ([[1, 2], [1, 2, 3]], [1]),  # one id of each is left to read
        ([[1, 2], [1, 2]], [1]),
        ([[1], [1, 2]], []),
        ([[1, 2], [2, 2]], []),
        ([[1, 2, 3]], [1, 2]),
        ([[1]], []),
    ],
)
def test_the_shared_beginning(texts: list[list[int]], shared: list[int]) -> None:
    assert shared_beginning(texts) == shared


def test_ids_that_the_tokenizer_does_not_know_are_never_chosen() -> None:
    model, prompts = varied_model(V=300), [[65 + i] for i in range(6)]
    free = greedy_replies(model, prompts, max_new_tokens=8, stop_ids=())
    known = greedy_replies(model, prompts, max_new_tokens=8, stop_ids=(), tokenizer=ByteTokenizer())
    assert max(token for reply in free for token in reply) >= 256 > max(token for reply in known for token in reply)
    for ids in known:
        ByteTokenizer().decode(ids)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([61], {}, "prompt id 61"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens"),
        ([1] * 33, {}, "longer than the 32 positions"),
        ([1], {"banned_ids": [99]}, "banned"),
    ],
)
def test_what_makes_no_sense_is_refused(prompt: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_replies(varied_model(), [[1], prompt], **{"max_new_tokens": 1, "stop_ids": (), **options})
    assert greedy_replies(varied_model(), [], max_new_tokens=1, stop_ids=()) == []


def test_plain_pytorch_leaves_idle_rows_alone() -> None:
    model = varied_model()
    engine = Engine(model, rows=3, T_max=8, native=False)
    engine.refresh()
    with torch.inference_mode():
        engine.prefill(1, [1, 2, 3], 0)
        before = engine.cache.k[:, 1].clone()
        engine.step([0, 2], [4, 5], [0, 0])
    assert torch.equal(engine.cache.k[:, 1], before) and engine.cache.k[:, [0, 2], :, 0].all()
