"""Many greedy replies at once are the replies of each prompt alone."""

from __future__ import annotations

from niels_gpt.generate import Sampling, stream_steps
from niels_gpt.infer.batch import greedy_replies
from tests.varied import random_ids, varied_model


def alone(model, prompt: list[int], n: int, stop_ids: set[int], banned: tuple[int, ...]) -> list[int]:
    n = min(n, model.cfg.T - len(prompt))
    steps = stream_steps(
        model, prompt, max_new_tokens=n, sampling=Sampling(temperature=0.0), stop_ids=stop_ids, banned_ids=banned
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
