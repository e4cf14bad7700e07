"""Tokens/s of the quickstart's training step alone and beside a busy program, with and without `niels_gpt.contention`.

    python tools/bench_contention.py [--busy 1] [--rounds 4] [--seconds 3]

Both ways take turns in one process on whole training steps; `waited` is how long its threads were ready to run without
a core, per second of a round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from niels_gpt import contention
from niels_gpt.device import keep_freed_memory
from tools.bench_common import SHAPES, machine
from tools.bench_train import our_step, random_batch


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, metavar="N", help="busy programs (default: 1)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="of each way (default: 4)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of a round (default: 3)")
    args = parser.parse_args(argv)
    if contention.seconds_waited() is None:
        print("error: this system does not say how long threads wait for a core (Linux does)", file=sys.stderr)
        return 1
    keep_freed_memory()
    shape = SHAPES["quickstart"]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        step = our_step(shape, "fp32", random_batch(shape, "cpu"), optimizer="muon").step
    step()
    print(machine())
    for busy in (0, args.busy):
        rates: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        with busy_programs(busy):
            for _ in range(args.rounds):
                for watched in rates:
                    rates[watched].append(_round(step, shape["B"] * shape["T"], args.seconds, watched))
        for watched, found in rates.items():
            speed, waited = (statistics.median(column) for column in zip(*found, strict=True))
            how = "with" if watched else "without"
            print(f"{busy} busy programs, {how} it: {speed:,.0f} tokens/s, waited {waited:.0%}")
        ratio = statistics.median(b[0] / a[0] for a, b in zip(*rates.values(), strict=True))
        print(f"{busy} busy programs: x{ratio:.2f}")
    return 0


def _round(step: Callable[[], object], tokens: int, seconds: float, watched: bool) -> tuple[float, float]:
    """tokens/s and seconds waited per second. The first second, in which the watch takes its looks, is not counted."""
    watch = contention.Watch()
    steps, began, waited, first = 0, 0.0, 0.0, 1.5 * contention.INTERVAL
    with mock.patch.object(contention, "look", watch.look if watched else lambda: None):
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + first + seconds:
            if not began and now > start + first:
                steps, began, waited = 0, now, contention.seconds_waited() or 0.0
            step()
            steps += 1
    took = time.perf_counter() - began
    watch.close()
    return steps * tokens / took, ((contention.seconds_waited() or 0.0) - waited) / took


if __name__ == "__main__":
    sys.exit(main())
