"""Time budgets on a clock that the test moves: on time whatever things cost, finished once, resumed with the rest."""

from __future__ import annotations

import argparse
import json
import math
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import checkpoint as ckpt
from niels_gpt.eval import EvalResult
from niels_gpt.settings import PhaseSettings, default_settings
from niels_gpt.train import budget as budget_module
from niels_gpt.train import loop as loop_module
from niels_gpt.train.budget import Budget
from niels_gpt.train.distributed import World
from niels_gpt.train.loop import Loop
from niels_gpt.train.run import main, minutes, moment
from niels_gpt.train.start import TimeLimit
from tests.train import workshop


class Clock:
    """Stands in for `time` where training looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (budget_module, loop_module):
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def slowed(
    loop: Loop,
    clock: Clock,
    *,
    step: float,
    evaluation: float,
    first: float = 0.0,
    spent: float = 0.0,
    later: tuple[float, float] = (math.inf, 1.0),
) -> list[float]:
    """Begin now, and let steps and evaluations take seconds; returns the list that learning rates will be put in.

    later: from which second on everything takes how many times as long.
    """
    object.__setattr__(loop.job, "began", clock.now)
    loop.budget = loop._budget(spent)
    rates: list[float] = []
    take = loop.train_step

    def pace() -> float:
        return later[1] if clock.now >= later[0] else 1.0

    def slow_step(n: int) -> Any:
        rates.append(loop.optimizer.param_groups[-1]["lr"])
        clock.now += step * pace() + (first if len(rates) == 1 else 0.0)
        return take(n)

    def slow_measure(stop: Any) -> dict[str, EvalResult]:
        clock.now += evaluation * pace()
        return {name: EvalResult(1.0, 1) for name in loop.job.evals}

    loop.train_step = slow_step  # type: ignore[method-assign]
    loop.evaluation.measure = slow_measure  # type: ignore[method-assign]
    return rates


@pytest.mark.parametrize(
    ("costs", "eval_every"),
    [
        ({"step": 3.0, "evaluation": 0.0}, 5),
        ({"step": 2.0, "evaluation": 8.0}, 5),
        ({"step": 1.0, "evaluation": 12.0}, 1000),  # the only evaluation is the last, which nobody has timed before
        ({"step": 1.0, "evaluation": 4.0, "first": 20.0}, 4),  # compiles
    ],
)
def test_a_minute_is_a_minute(world: dict[str, Any], clock: Clock, costs: dict[str, float], eval_every: int) -> None:
    loop = workshop.make_loop(
        world, minutes=1.0, lr_shape="linear", decay_fraction=1.0, min_lr=0.0, eval_every=eval_every, eval_steps=40
    )
    rates = slowed(loop, clock, **costs)
    loop.run()
    assert 60 - 2 * costs["step"] - 0.5 * costs["evaluation"] - 5 <= clock.now <= 60
    assert max(rates) > 0.5 * 0.01 and rates[-1] <= 0.2 * max(rates)
    assert loop.budget.learning_rate(loop.state.step) == 0.0


@pytest.mark.parametrize("times", [3.0, 0.4])
def test_a_machine_that_changes_its_pace_halfway(world: dict[str, Any], clock: Clock, times: float) -> None:
    """It still ends in time, within 5 %, with the schedule completed."""
    loop = workshop.make_loop(
        world, minutes=4.0, lr_shape="linear", decay_fraction=1.0, min_lr=0.0, eval_every=40, eval_steps=40
    )
    rates = slowed(loop, clock, step=2.0, evaluation=0.5, later=(120.0, times))
    loop.run()
    assert 0.95 * 240 <= clock.now <= 1.05 * 240
    assert rates[-1] <= 0.1 * max(rates) and loop.budget.learning_rate(loop.state.step) == 0.0


def test_an_evaluation_that_takes_most_of_the_budget_leaves_half_of_it_for_steps(
    world: dict[str, Any], clock: Clock
) -> None:
    loop = workshop.make_loop(world, minutes=0.5, eval_every=1000, eval_steps=10_000)
    rates = slowed(loop, clock, step=1.0, evaluation=25.0)
    loop.run()
    assert 14 <= len(rates) <= 17  # of the half


def test_there_is_always_time_for_one_step(world: dict[str, Any], clock: Clock) -> None:
    """Opening caches may take longer than the budget, and a model that has learned nothing is no use to anyone."""
    loop = workshop.make_loop(world, minutes=0.001)
    rates = slowed(loop, clock, step=1.0, evaluation=1.0, spent=20.0)
    assert loop.run().state.step == len(rates) == 1


def test_what_follows_the_end_is_kept_back_before_it_was_ever_timed() -> None:
    options = PhaseSettings(minutes=10.0)
    budget = Budget(options, evaluation_in_steps=40, save_bytes=10**9)
    budget.note_step(60.0)  # compiles: says nothing of later steps
    assert budget.reserve == pytest.approx(1.2 * 10)
    budget.note_step(2.0)
    assert budget.reserve == pytest.approx(2 + 1.2 * (40 * 2 * 0.5 + 10))
    budget.note_evaluation(5.0)
    budget.note_save(1.0)
    assert budget.reserve == pytest.approx(2 + 1.2 * (5 + 1))
    budget.note_evaluation(1e6)
    assert budget.reserve == 300


def test_a_finished_run_is_not_gone_on_with_unless_it_is_given_more(world: dict[str, Any], clock: Clock) -> None:
    spent = 0.0

    def steps_after(minutes: float, *, resume: bool = True) -> int:
        nonlocal spent
        loop = workshop.make_loop(world, minutes=minutes, resume=resume)
        slowed(loop, clock, step=2.0, evaluation=1.0, spent=spent)
        result = loop.run()
        spent = result.elapsed
        return result.state.step

    first = steps_after(0.5, resume=False)
    assert first > 5
    latest = ckpt.phase_paths("pretrain").latest
    before = latest.read_bytes()
    used = spent
    for same_or_less in (0.5, 0.25):
        assert steps_after(same_or_less) == first and latest.read_bytes() == before
        assert spent == used  # by training: the evaluation that shows the result again is none of it
    ckpt.phase_paths("pretrain").best.unlink()  # which is made again, in a new checkpoint
    assert steps_after(0.5) == first and latest.read_bytes() != before
    assert spent == used == (ckpt.load_checkpoint(latest, device="cpu")["resume"] or {})["elapsed_s"]
    assert steps_after(1.0) > first + 5 and spent > used + 10


def test_a_resumed_run_has_what_is_left(world: dict[str, Any], clock: Clock) -> None:
    loop = workshop.make_loop(world, minutes=1.0, eval_every=1000)
    slowed(loop, clock, step=2.0, evaluation=1.0)
    while clock.now < 40:
        loop._one_step()
    loop._save(False)
    clock.now = 1000.0
    resumed = workshop.make_loop(world, resume=True)
    slowed(resumed, clock, step=2.0, evaluation=1.0, spent=40.0)
    resumed.run()
    assert 1014 <= clock.now <= 1020


def test_a_deadline_counts_time_asleep(clock: Clock) -> None:
    """A suspended machine's monotonic clock stands still, the wall clock does not."""
    budget = Budget(PhaseSettings(minutes=2.0), deadline=clock.time() + 120)
    budget._started = clock.now  # pretend that the monotonic clock stays here
    clock.now += 60
    budget._started += 60
    assert budget.elapsed == 0 and budget.progress(0) == pytest.approx(0.5, abs=0.01)


def test_all_go_by_the_main_clock() -> None:
    """Under a time budget a process takes progress and learning rate from process 0, until they agree again."""

    class Other(World):
        def from_main(self, make: Any) -> Any:
            return (30.0, 10.0, 5.0)  # seconds left, reserve, seconds of an evaluation

    budget = Budget(default_settings().training.pretrain.model_copy(update={"minutes": 1.0}))
    assert budget.progress(0) < 0.1
    budget.agree(Other(rank=1, size=2))
    assert budget.progress(0) == pytest.approx(30 / 50) and budget.reserve == 10
    assert budget.has_room_for_evaluation() and budget.remaining_seconds(0, 1.0) == 30


def test_flags() -> None:
    now = datetime.now().astimezone()
    later = (now + timedelta(minutes=90)).replace(second=0, microsecond=0)
    assert moment(f"{later:%H:%M}") == later.timestamp()
    earlier = (now - timedelta(minutes=90)).replace(second=0, microsecond=0)
    assert moment(f"{earlier:%H:%M}") == pytest.approx((earlier + timedelta(days=1)).timestamp(), abs=3601)
    assert moment(later.isoformat()) == moment(f"{later:%Y-%m-%dT%H:%M}") == later.timestamp()
    assert minutes("0.5") == 0.5
    for function, wrong in (
        (moment, ["25:00", "soon", "2001-01-01T00:00", "9999-01-01"]),
        (minutes, ["0", "nan", "x"]),
    ):
        for text in wrong:
            with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
                function(text)  # type: ignore[operator]


def test_wrong_flags_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--minutes", "-1"], ["--until", "24:00"], ["--minutes", "1", "--until", "07:00"]):
        with pytest.raises(SystemExit) as leave:
            main(["--phase", "pretrain", "--config", "c.json", *flags])
        assert leave.value.code == 2 and "error: argument --" in capsys.readouterr().err


def test_a_limit_becomes_a_setting(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert TimeLimit().flags("sft") == {}
    assert TimeLimit(3.0).flags("sft") == {"training": {"sft": {"minutes": 3.0}}}
    until = TimeLimit(deadline=datetime.now().timestamp() + 600).flags("pretrain", spent_seconds=1200)
    assert until["training"]["pretrain"]["minutes"] == pytest.approx(30, abs=0.1)
    over = TimeLimit(deadline=datetime.now().timestamp() - 600).flags("pretrain")
    assert 0 < over["training"]["pretrain"]["minutes"] < 0.1  # just the last evaluation and save


def test_the_command_keeps_its_time(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(world))
    common = ("--phase", "pretrain", "--config", "config.json", "--device", "cpu")
    assert main([*common, "--minutes", "0.02"]) == 0
    record = ckpt.load_checkpoint("checkpoints/pretrain/latest.pt", device="cpu")["resume"] or {}
    assert record["is_finished"] and record["finished_s"] == pytest.approx(1.2)
    assert record["settings"]["training"]["pretrain"]["minutes"] == 0.02
