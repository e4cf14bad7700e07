"""What training does while other programs want the cores, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from niels_gpt import contention
from niels_gpt.contention import Watch, pools_needed, seconds_waited

ROOT = Path(__file__).parents[1]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long threads wait")


class Time:
    """A clock, and how long threads have waited by it."""

    def __init__(self) -> None:
        self.now, self.waited = 100.0, 7.0

    def passes(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.waited += seconds * share


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with pools, in order."""
    done: list[str] = []

    class Noted:
        def __init__(self) -> None:
            done.append("made")

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(contention, "Pool", Noted)
    monkeypatch.setattr(contention, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return done


def test_pools_are_there_while_threads_wait_for_cores(pools: list[str]) -> None:
    time = Time()
    watch = Watch(lambda: time.waited, lambda: time.now)
    for seconds, share, expected in (
        (0, 0.0, []),
        (0.5, 0.9, []),  # no look yet
        (0.6, 0.9, ["made"]),
        (2, 0.7, ["made"]),
        (2, 0.15, ["made"]),  # neither busy nor quiet: it stays as it is
        (2, 0.02, ["made", "closed"]),
        (2, 0.15, ["made", "closed"]),
        (2, 0.3, ["made", "closed", "made"]),
    ):
        time.passes(seconds, share)
        watch.look()
        assert pools == expected
    watch.close()
    assert pools == ["made", "closed", "made", "closed"] and not watch.pools


def test_where_nothing_says_it_nothing_is_done(pools: list[str]) -> None:
    time, known = Time(), [True, False, True, True]
    watch = Watch(lambda: time.waited if known.pop(0) else None, lambda: time.now)
    for _ in range(3):
        time.passes(2, 0.9)
        watch.look()
    assert not pools  # a thread that ended amid a look makes no difference to the next two
    time.passes(2, 0.9)
    watch.look()
    assert pools == ["made"]


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 8, 12, 16, 64])
def test_pools_make_the_threads_outnumber_the_cores_and_not_by_more_than_one_of_them(cores: int) -> None:
    assert pools_needed(1, cores) == 0  # one thread waits for nobody
    assert pools_needed(cores + 1, cores) == 0  # OpenMP knows that by itself
    for threads in range(2, cores + 1):
        needed = pools_needed(threads, cores)
        assert threads + needed * (threads - 1) > cores >= threads + (needed - 1) * (threads - 1)


@linux_only
def test_waiting_for_a_core_is_seen() -> None:
    """Two programs on one core: either waits while the other runs."""
    script = """
import os, subprocess, sys, time
from niels_gpt.contention import seconds_waited
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = seconds_waited()
with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
    try:
        for _ in range(200):  # until it is seen, however slow the machine
            began = time.monotonic()
            while time.monotonic() - began < 0.1:
                pass
            if seconds_waited() - before > 0.05:
                sys.exit(0)
    finally:
        other.kill()
sys.exit("not seen")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (seconds_waited() or -1) >= 0


@linux_only
def test_a_pool_is_threads_that_sleep_and_changes_no_result() -> None:
    script = """
import os, torch
from niels_gpt.contention import Pool
torch.set_num_threads(3)
torch.manual_seed(0)
a, b = torch.randn(300, 400), torch.randn(400, 500)
def found():
    product = (a @ b).tanh()
    return product, product.sum()
before, threads = found(), len(os.listdir("/proc/self/task"))
pool = Pool()
assert len(os.listdir("/proc/self/task")) == threads + 3
assert all(torch.equal(x, y) for x, y in zip(before, found()))
pool.close()
for _ in range(1000):  # OpenMP's own are told to end, not waited for
    if len(os.listdir("/proc/self/task")) == threads:
        raise SystemExit(0)
    __import__("time").sleep(0.01)
raise SystemExit("threads are left")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_pool_can_be_left_to_the_end_of_the_program() -> None:
    script = "from niels_gpt.contention import Pool; Pool(); print('done')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == b"done\n"
