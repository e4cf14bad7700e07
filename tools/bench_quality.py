"""Held-out bits per byte against training time, beside transformers' Llama and Trainer and a byte 5-gram, in one run

    python tools/bench_quality.py --minutes 5                     # ours, the peer at three learning rates, the floor
    python tools/bench_quality.py --minutes 15 --peer-lr best     # the same folder's best learning rate, for longer

The text, tokenizer, model shape and batch are the quickstart's (small talk and the primer, offline). Ours is
pretraining by the project's own settings with this budget. The peer is LlamaForCausalLM of the same shape with
transformers.Trainer at its defaults (AdamW, linear decay, its own dataloader) on the same tokens, its schedule also
driven by the clock. Evaluation stops the clock of either. As many runs as fit go on at once, each on cores of its own
(`--threads` each), so that they share the machine's moods. Results gather in OUT/results.json, with a plot.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, here and in the runs

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from niels_gpt import paths
from niels_gpt.files import explained, write_text
from tools.bench_common import machine
from tools.quality_report import Results, plot, read_results, table, verdict, write_results
from tools.quality_systems import OURS, PEER, Point, Run, Spec
from tools.quality_systems import run as run_system
from tools.quality_text import Text, build_text, make_overrides, measure_floor, open_text

CONFIG = "configs/quickstart.json"
PEER_RATES = (5e-4, 1e-3, 3e-3)
BEST = "best"
FLOOR = "floor"
SMALLEST_BUDGET = 0.05  # minutes


def work(spec: Spec, cores: Sequence[int], barrier: Any, messages: Any) -> None:
    """One run in a process and a folder of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            found = run_system(
                spec, ready=lambda: barrier.wait(), say=lambda point: messages.put((spec.name, "point", point))
            )
            os.chdir("/")
        messages.put((spec.name, "run", found))
    except BaseException as error:
        barrier.abort()
        messages.put((spec.name, "error", f"{type(error).__name__}: {error}"))
        raise


def run_together(specs: Sequence[Spec], progress: Progress) -> list[Run]:
    """Runs that start their clocks together; RuntimeError if one of them fails."""
    context = multiprocessing.get_context("spawn")
    barrier, messages = context.Barrier(len(specs)), context.Queue()
    cores = usable_cores()
    os.environ["OMP_NUM_THREADS"] = str(specs[0].threads)
    processes = {}
    for i, spec in enumerate(specs):
        own = cores[i * spec.threads : (i + 1) * spec.threads]
        processes[spec.name] = context.Process(target=work, args=(spec, own, barrier, messages), daemon=True)
    bars = {s.name: progress.add_task(f"{s.name}: starting", total=s.points + 1) for s in specs}
    for process in processes.values():
        process.start()
    runs: dict[str, Run] = {}
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
        for process in processes.values():
            process.join(timeout=20 if len(runs) == len(specs) else 0)
            if process.is_alive():
                process.terminate()
    return [runs[spec.name] for spec in specs]


def next_message(messages: Any, processes: dict[str, Any], done: dict[str, Run]) -> tuple[str, str, Any]:
    """Wait for the runs to say something; a process that died without a word is an error."""
    while True:
        dead = [name for name, p in processes.items() if name not in done and p.exitcode not in (None, 0)]
        try:
            message: tuple[str, str, Any] = messages.get(timeout=1.0)
            if not (message[1] == "error" and "BrokenBarrierError" in message[2]):  # another run failed: it says why
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
    common = {"minutes": args.minutes, "seed": args.seed, "overrides": overrides, "windows": args.windows}
    common |= {"points": args.points, "threads": args.threads}
    rates = args.peer_lr
    if rates == [BEST]:
        best = results.best_peer()
        if best is None or best.lr is None:
            raise ValueError(f"--peer-lr {BEST} needs an earlier run of the peer in {args.out}; run a short one first")
        rates = [best.lr]
    specs = [Spec(OURS, **common)] if args.only in (None, OURS) else []
    if args.only in (None, PEER):
        specs += [Spec(PEER, **common, lr=rate, batch=args.peer_batch) for rate in rates]
    return specs


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
    overrides = make_overrides(args.config, out / "text", minutes=args.minutes, seed=args.seed)
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
        console.print(
            f"{len(specs)} runs of {args.minutes:g} minutes, {min(together, len(specs))} at a time on {args.threads} "
            f"thread(s) each: {args.minutes * len(groups):g} minutes of training, and their evaluations",
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
    console.print(f"\n{machine()}", markup=False)
    if not runs:
        if results.floor:
            console.print(f"byte {results.floor.order}-gram: {results.floor.windows:.4f} bits per byte", markup=False)
        return
    picture = out / f"quality-{args.minutes:g}min.svg"
    write_text(picture, plot(runs, results.floor))
    console.print(f"\n{table(runs, results.floor)}\n\n{verdict(runs, results.floor)}", markup=False)
    console.print(f"\nresults: {out / 'results.json'}; plot: {picture}", markup=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of every run (default: %(default)g)")
    parser.add_argument("--threads", type=int, default=1, help="cores of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/quality"), help="folder (default: %(default)s)")
    parser.add_argument("--only", choices=(OURS, PEER, FLOOR), help="one of them; the results of others stay")
    parser.add_argument("--peer-lr", nargs="+", type=rate, default=list(PEER_RATES), metavar="X", help=LR_HELP)
    parser.add_argument("--peer-batch", type=int, help="rows of a step of the peer (default: as many as ours)")
    parser.add_argument("--points", type=int, default=10, help="evaluations on the way (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=256, help="held-out windows of an evaluation (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of weights and order (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=paths.shipped(CONFIG), help=f"settings (default: {CONFIG})")
    args = parser.parse_args(argv)
    if not args.minutes >= SMALLEST_BUDGET:
        parser.error(f"--minutes must be at least {SMALLEST_BUDGET}")
    if not 1 <= args.threads <= len(usable_cores()):
        parser.error(f"--threads must be 1 to {len(usable_cores())}, the cores of this machine")
    for name in ("points", "windows", "peer_batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if BEST in args.peer_lr and len(args.peer_lr) > 1:
        parser.error(f"--peer-lr takes either numbers or {BEST}")
    return args


LR_HELP = f"learning rates of the peer, or `{BEST}`: the best in results.json (default: {PEER_RATES})"


def rate(text: str) -> float | str:
    if text == BEST:
        return text
    if not 0 < (value := float(text)) < 10:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        measure(args, console)
    except KeyboardInterrupt:
        print("interrupted; finished rounds are in results.json", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {explained(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
