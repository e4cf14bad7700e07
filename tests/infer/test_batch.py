"""Many texts at once are the texts that each request gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from niels_gpt.config import NEW, V1, V2, Architecture
from niels_gpt.generate import Request, Sampling, stream_batch, stream_steps
from niels_gpt.infer.batch import greedy_replies
from niels_gpt.infer.engine import Engine
from niels_gpt.model.gpt import GPT
from niels_gpt.native import build
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


def mixed(i: int, sampling: Sampling = GREEDY) -> Request:
    """The i-th of requests that differ in everything; some outgrow a context of 32."""
    return Request(
        random_ids(1 + i * 7 % 40, 61, seed=i),
        max_new_tokens=(3, 11, 24, 50)[i % 4],
        sampling=sampling,
        generator=torch.Generator().manual_seed(i),
        stop_ids={i % 61, (i * 5) % 61} if i % 3 else set(),
        banned_ids=(i % 7, 10 + i % 9),
    )


def run_alone(model: GPT, request: Request, **options: Any) -> list[Any]:
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__}
    return list(stream_steps(model, fields.pop("prompt_ids"), **fields, **options))


@pytest.mark.skipif(build.compiler() is None, reason="only the native decoder promises the same bits")
@pytest.mark.parametrize("arch", [V1, V2, NEW], ids=["v1", "v2", "new"])
def test_64_mixed_requests_get_exactly_what_each_gets_alone(arch: Architecture) -> None:
    model = varied_model(arch)
    expected = [run_alone(model, mixed(i), top_n=2) for i in range(64)]
    for max_rows in (64, 5):
        found: list[list[Any]] = [[] for _ in range(64)]
        for i, step in stream_batch(model, [mixed(i) for i in range(64)], max_rows=max_rows, top_n=2):
            found[i].append(step)
        assert found == expected  # ids, log-probabilities, entropies and alternatives, to the bit
    assert len({len(steps) for steps in expected}) > 5
    assert sum(len({s.token_id for s in steps}) > 4 for steps in expected) > 20


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, 20, 0.95, 1.2), Sampling(1.3, min_p=0.05)])
def test_every_request_keeps_its_own_sampling_and_seed(sampling: Sampling, native: bool) -> None:
    model = varied_model()
    requests = [mixed(i, sampling if i % 2 else Sampling(1.0)) for i in range(12)]
    found: list[list[int]] = [[] for _ in requests]
    for i, step in stream_batch(model, requests, max_rows=4, native=native):
        found[i].append(step.token_id)
    again = [mixed(i, sampling if i % 2 else Sampling(1.0)) for i in range(12)]
    assert found == [[s.token_id for s in run_alone(model, r)] for r in again]


def test_text_comes_with_each_step() -> None:
    model, tokenizer = varied_model(V=256), ByteTokenizer()
    requests = [Request([65 + i], 9, Sampling(3.0), torch.Generator().manual_seed(i)) for i in range(3)]
    texts, ids = ["", "", ""], list[list[int]]([[], [], []])
    for i, step in stream_batch(model, requests, tokenizer=tokenizer):
        texts[i] += step.text
        ids[i].append(step.token_id)
    assert texts == [tokenizer.decode(row) for row in ids]


def test_nothing_asked_is_nothing_done() -> None:
    model = varied_model()
    assert list(stream_batch(model, [])) == []
    assert [i for i, _ in stream_batch(model, [Request([1], 0, GREEDY), Request([1], 2, GREEDY)])] == [1, 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1, GREEDY), "no tokens"),
        (Request([61], 1, GREEDY), "prompt id 61"),
        (Request([1], -1, GREEDY), "max_new_tokens"),
        (Request([1], 1, GREEDY, banned_ids=[99]), "banned"),
    ],
)
def test_bad_requests_fail_at_the_call(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_batch(varied_model(), [Request([1], 1, GREEDY), request_])
    with pytest.raises(ValueError, match="max_rows"):
        stream_batch(varied_model(), [], max_rows=0)


def test_plain_pytorch_leaves_idle_rows_alone() -> None:
    model = varied_model()
    engine = Engine(model, rows=3, T_max=8, native=False)
    engine.refresh()
    with torch.inference_mode():
        engine.prefill(1, [1, 2, 3], 0)
        before = engine.cache.k[:, 1].clone()
        engine.step([0, 2], [4, 5], [0, 0])
    assert torch.equal(engine.cache.k[:, 1], before) and engine.cache.k[:, [0, 2], :, 0].all()
