"""Held-out bits per byte against training time, beside transformers' Llama and Trainer and a byte 5-gram, in one run

    python tools/bench_quality.py --minutes 5                     # ours, the peer at three learning rates, the floor
    python tools/bench_quality.py --minutes 15 --peer-lr best     # the same folder's best learning rate, for longer

The text, tokenizer and model shape are the quickstart's (small talk and the primer, offline). Ours is pretraining by
the project's own settings with this budget. The peer is LlamaForCausalLM of the same shape with transformers.Trainer
at its defaults (AdamW, linear decay, its own dataloader) on the same tokens, but for the learning rate and the rows of
a step, which are tuned; its schedule follows the clock as well. Evaluation stops the clock of either. As many runs as
fit go on at once, each on cores of its own (`--threads` each), so that they share the machine's moods. Results gather
in OUT/results.json, with a plot.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, here and in the runs

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from niels_gpt import paths
from niels_gpt.console import OutputConsole
from niels_gpt.files import explained, write_text
from tools.bench_common import machine
from tools.quality_report import Results, plot, read_results, table, verdict, write_results
from tools.quality_systems import OURS, PEER, Point, Run, Spec
from tools.quality_systems import run as run_system
from tools.quality_text import Text, build_text, make_overrides, measure_floor, open_text

CONFIG = "configs/quickstart.json"
PEER_RATES = (1e-3, 1.5e-3, 2.5e-3)
PEER_BATCHES = (4,)  # AdamW learns more from these than from the Trainer's default of 8 or our 16 in so few tokens
BEST = "best"
FLOOR = "floor"
SMALLEST_BUDGET = 0.05  # minutes
PATIENCE = 20.0  # seconds that a process may take to end


def work(spec: Spec, cores: Sequence[int], folder: Path, barrier: Any, messages: Any) -> None:
    """One run in a process and a folder of its own; the parent decides what Ctrl-C means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    parent = os.getppid()

    def say(point: Point) -> None:
        if os.getppid() != parent:
            raise RuntimeError("the benchmark that started this run is gone")
        messages.put((spec.label, "point", point))

    try:
        folder.mkdir()
        os.chdir(folder)
        messages.put((spec.label, "run", run_system(spec, ready=barrier.wait, say=say)))
    except threading.BrokenBarrierError:  # another run failed, and says why
        sys.exit(1)
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, RuntimeError))
        messages.put((spec.label, "error", explained(error) if expected else traceback.format_exc()))
        barrier.abort()
        sys.exit(1)


def run_together(specs: Sequence[Spec], progress: Progress) -> list[Run]:
    """Runs that start their clocks together; RuntimeError if one of them fails."""
    context = multiprocessing.get_context("spawn")
    barrier, messages = context.Barrier(len(specs)), context.Queue()
    cores = usable_cores()
    os.environ["OMP_NUM_THREADS"] = str(specs[0].threads)
    bars = {s.label: progress.add_task(f"{s.label}: starting", total=s.points + 1) for s in specs}
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as scratch:
        processes = {}
        for i, spec in enumerate(specs):
            own = cores[i * spec.threads : (i + 1) * spec.threads]
            about = (spec, own, Path(scratch) / str(i), barrier, messages)
            processes[spec.label] = context.Process(target=work, args=about, daemon=True)
            processes[spec.label].start()
        try:
            while len(runs) < len(specs):
                name, kind, value = next_message(messages, processes, runs)
                if kind == "error":
                    raise RuntimeError(f"{name} failed: {value}")
                if kind == "run":
                    runs[name] = value
                else:
                    show_point(progress, bars[name], name, value)
        finally:
            end(list(processes.values()), patience=PATIENCE if len(runs) == len(specs) else 0)
    return [runs[spec.label] for spec in specs]


def end(processes: Sequence[Any], patience: float) -> None:
    """Wait for processes that are done, and stop those that are not."""
    for process in processes:
        process.join(timeout=patience)
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(timeout=PATIENCE)
        if process.is_alive():
            process.kill()


def next_message(messages: Any, processes: dict[str, Any], done: dict[str, Run]) -> tuple[str, str, Any]:
    """Wait for the runs to say something; a process that died without a word is an error."""
    while True:
        dead = [name for name, p in processes.items() if name not in done and p.exitcode not in (None, 0)]
        try:
            message: tuple[str, str, Any] = messages.get(timeout=1.0)
            return message
        except queue.Empty:
            if dead:
                return dead[0], "error", f"its process ended with exit code {processes[dead[0]].exitcode}"


def show_point(progress: Progress, bar: Any, name: str, point: Point) -> None:
    progress.update(bar, advance=1, description=f"{name}: {point.bits:.4f}")
    speed = f", {point.tokens / (60 * point.minutes):,.0f} tokens/s" if point.tokens else ""
    progress.console.print(
        f"{name}: {point.minutes:.2f} min, {point.bits:.4f} bits per byte{speed}", markup=False, highlight=False
    )


def usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def make_specs(args: argparse.Namespace, overrides: dict[str, Any], results: Results) -> list[Spec]:
    common = {"seed": args.seed, "overrides": overrides, "windows": args.windows}
    common |= {"points": args.points, "threads": args.threads}
    full, half = {"minutes": args.minutes, **common}, {"minutes": args.minutes / 2, **common}
    choices = list(itertools.product(args.peer_lr, args.peer_batch))
    if args.peer_lr == [BEST]:
        best = results.best_peer()
        if best is None:
            raise ValueError(f"--peer-lr {BEST} needs an earlier run of the peer in {args.out}; run a short one first")
        choices = [(best.lr, best.batch)]
    specs = [Spec(OURS, **full)] if args.only in (None, OURS) else []
    if args.only in (None, PEER):
        specs += [Spec(PEER, **full, lr=lr, batch=batch) for lr, batch in choices]
    return specs + ([Spec(OURS, **half)] if args.half else [])


def setup_of(text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """What results in one file have in common."""
    settings = text.settings
    return {
        "config": args.config.name,
        "tokenizer": text.tokenizer.sha256,
        "train_tokens": {name: stream.num_tokens for name, stream in sorted(text.train.items())},
        "held_out": text.held_out.name,
        "held_out_tokens": text.held_out.num_tokens,
        "windows": len(text.starts),
        "model": settings.model.model_dump(),
    }


def measure(args: argparse.Namespace, console: Console) -> None:
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console.print("text: tokenizer and caches", markup=False)
    overrides = make_overrides(args.config, out / "text", seed=args.seed)
    build_text(overrides)
    text = open_text(overrides, args.windows)
    path = out / "results.json"
    results = read_results(path, setup_of(text, args))
    if args.only in (None, FLOOR) and results.floor is None:
        console.print("floor: counting n-grams", markup=False)
        results.floor = measure_floor(text)
        write_results(path, results)
    specs = make_specs(args, overrides, results)
    together = max(1, len(usable_cores()) // args.threads)
    groups = [specs[i : i + together] for i in range(0, len(specs), together)]
    if groups:
        minutes = sum(max(spec.minutes for spec in group) for group in groups)
        console.print(
            f"{len(specs)} runs, {min(together, len(specs))} at a time on {args.threads} thread(s) each: "
            f"{minutes:g} minutes of training, and their evaluations",
            markup=False,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    for group in groups:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for found in run_together(group, progress):
                results.add(found)
        write_results(path, results)
    show(results, args, out, console)


def show(results: Results, args: argparse.Namespace, out: Path, console: Console) -> None:
    runs = results.of(args.minutes, args.threads, args.seed)
    half = next((run for run in results.of(args.minutes / 2, args.threads, args.seed) if run.system == OURS), None)
    console.print(f"\n{machine()}", markup=False)
    if not runs:
        if results.floor:
            console.print(f"byte {results.floor.order}-gram: {results.floor.windows:.4f} bits per byte", markup=False)
        return
    picture = out / f"quality-{args.minutes:g}min.svg"
    write_text(picture, plot(runs, results.floor))
    console.print(f"\n{table(runs, results.floor)}\n\n{verdict(runs, results.floor, half)}", markup=False)
    console.print(f"\nresults: {out / 'results.json'}; plot: {picture}", markup=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of every run (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="cores of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/quality"), help="folder (default: %(default)s)")
    parser.add_argument("--only", choices=(OURS, PEER, FLOOR), help="one of them; the results of others stay")
    parser.add_argument("--half", action="store_true", help="also a run of ours of half the minutes")
    parser.add_argument("--peer-lr", nargs="+", type=rate, default=list(PEER_RATES), metavar="X", help=LR_HELP)
    parser.add_argument("--peer-batch", nargs="+", type=int, default=list(PEER_BATCHES), metavar="N", help=BATCH_HELP)
    parser.add_argument("--points", type=int, default=10, help="evaluations on the way (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows of an evaluation (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of weights and order (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=paths.shipped(CONFIG), help=f"settings (default: {CONFIG})")
    args = parser.parse_args(argv)
    if not args.minutes >= SMALLEST_BUDGET:
        parser.error(f"--minutes must be at least {SMALLEST_BUDGET}")
    if not 1 <= args.threads <= len(usable_cores()):
        parser.error(f"--threads must be 1 to {len(usable_cores())}, the cores of this machine")
    for name, values in (("points", [args.points]), ("windows", [args.windows]), ("peer-batch", args.peer_batch)):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1")
    if BEST in args.peer_lr and len(args.peer_lr) > 1:
        parser.error(f"--peer-lr takes either numbers or {BEST}")
    return args


LR_HELP = f"learning rates of the peer, or `{BEST}`: rate and rows of the best in results.json (default: {PEER_RATES})"
BATCH_HELP = f"rows of a step of the peer, tried with every rate (default: {PEER_BATCHES})"


def rate(text: str) -> float | str:
    if text == BEST:
        return text
    if not 0 < (value := float(text)) < 10:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate")
    return value


def stop(signum: int, frame: object) -> None:
    """SIGTERM ends the runs as Ctrl-C does, instead of leaving them behind."""
    raise KeyboardInterrupt(signum)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = OutputConsole()
    signal.signal(signal.SIGTERM, stop)
    try:
        measure(args, console)
    except KeyboardInterrupt as reason:
        print("interrupted; finished rounds are in results.json", file=sys.stderr)
        return 128 + (signal.SIGTERM if reason.args else signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {explained(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
