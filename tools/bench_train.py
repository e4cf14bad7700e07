"""Tokens/s, share of the GEMM peak and peak memory of the real training step beside its peers, in one run.

    python tools/bench_train.py [--shape quickstart|default|gpt2|all] [--rounds 8] [--json FILE]
    python tools/bench_train.py --device cuda        # default and GPT-2 124M shapes in bf16, compiled

Ours is `train.loop.Loop.train_step`. The candidates take turns in one process, all with glibc keeping freed memory, so
that it is the steps that differ; memory is each one's peak in a process of its own, with what the libraries take by
themselves. A peer that is not installed is left out, with a line that says so. litgpt goes beside the project:

    pip install --no-deps --target DIR litgpt lightning lightning-utilities torchmetrics pytorch-lightning
    PYTHONPATH=DIR python tools/bench_train.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from niels_gpt.batching import Batch
from niels_gpt.device import keep_freed_memory
from niels_gpt.device import peak_memory as device_peak
from niels_gpt.settings import resolve_settings
from niels_gpt.train.job import Job
from niels_gpt.train.loop import Loop
from niels_gpt.train.report import Reporter
from tools import bench_peers as peers
from tools.bench_common import KEYS, SHAPES, flops_per_token, gemm_peak, interleaved, machine, median_and_spread
from tools.bench_peers import Candidate, Shape

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP = 2
RATE = 0.1  # dropout of the published models
MEMORY_STEPS = 3
Build = Callable[[Shape, str, Batch], Candidate]


def our_step(
    shape: Shape, precision: str, batch: Batch, *, optimizer: str = "adamw", compiled: bool = False, rate: float = 0.0
) -> Candidate:
    """The loop's own step at these settings."""
    phase: dict[str, Any] = {"micro_B": shape["B"], "optimizer": optimizer, "total_steps": 1000, "compile": compiled}
    phase |= {"amp": precision != "fp32", "amp_dtype": "bf16"}
    overrides = {
        "model": {key: shape[key] for key in KEYS} | {"dropout": rate},
        "tokenizer": {"vocab_size": shape["V"]},
        "training": {"pretrain": phase},
    }
    job = Job("pretrain", resolve_settings("pretrain", overrides), lambda step, m: batch, {}, lambda _: float("nan"))
    device = batch.x.device.type
    loop = Loop(job, device=device, reporter=Reporter("pretrain", "bench", quiet=True), resume=None, init=None)
    return Candidate(lambda: loop.train_step(0), peers.matmul_parameters(loop.model))


def peer(build: Callable[..., Candidate], **options: Any) -> Build:
    return lambda shape, precision, batch: build(shape, precision, batch.x, batch.y, **options)


# name -> builder; ratios are against the first of a group
WITHOUT_DROPOUT: dict[str, Build] = {
    "niels-gpt, AdamW": our_step,
    "niels-gpt, AdamW, compiled": partial(our_step, compiled=True),
    "niels-gpt, Muon": partial(our_step, optimizer="muon"),
    "niels-gpt, Muon, compiled": partial(our_step, optimizer="muon", compiled=True),
    "transformers Llama": peer(peers.transformers_step, family="Llama", compiled=False),
    "transformers Qwen3": peer(peers.transformers_step, family="Qwen3", compiled=False),
    "litgpt Llama": peer(peers.litgpt_step),
    "nanoGPT's shape": peer(peers.nano_step, compiled=False),
    "our matrix products alone": peer(peers.products_step),
}
WITH_DROPOUT: dict[str, Build] = {
    "niels-gpt, AdamW, dropout 0.1": partial(our_step, rate=RATE),
    "niels-gpt, AdamW, compiled, dropout 0.1": partial(our_step, rate=RATE, compiled=True),
    "materialised attention, dropout 0.1": peer(peers.plain_step, rate=RATE),
}
COMPILED_PEERS: dict[str, Build] = {
    "transformers Llama, compiled": peer(peers.transformers_step, family="Llama", compiled=True),
    "nanoGPT's shape, compiled": peer(peers.nano_step, compiled=True),
}
ALL = WITHOUT_DROPOUT | WITH_DROPOUT | COMPILED_PEERS
ON_GPU = ("niels-gpt, AdamW, compiled", "niels-gpt, Muon, compiled", "niels-gpt, AdamW", *COMPILED_PEERS)
# (ours, peer, least ratio of ours at the default shape, at the quickstart's); None is the GEMM peak
TARGETS: tuple[tuple[str, str | None, float, float], ...] = (
    ("niels-gpt, AdamW", "transformers Llama", 1.20, 1.10),
    ("niels-gpt, AdamW", "litgpt Llama", 1.20, 1.10),
    ("niels-gpt, AdamW", "nanoGPT's shape", 1.05, 1.05),
    ("niels-gpt, AdamW", None, 0.75, 0.62),
    ("niels-gpt, AdamW, dropout 0.1", "materialised attention, dropout 0.1", 1.8, 1.8),
)


def random_batch(shape: Shape, device: str) -> Batch:
    tokens = torch.randint(shape["V"], (shape["B"], shape["T"] + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(device)


def build(names: list[str], shape: Shape, precision: str, batch: Batch) -> dict[str, Candidate]:
    """The candidates that this machine can build; the first call, which compiles, is made here and timed on stderr."""
    built: dict[str, Candidate] = {}
    for name in names:
        try:
            began = time.perf_counter()
            candidate = ALL[name](shape, precision, batch)
            candidate.step()
        except Exception as error:
            if not isinstance(error, ImportError) and "compiled" not in name:
                raise
            print(f"left out: {name}: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr)
            continue
        print(f"{name}: built, first step done after {time.perf_counter() - began:.1f} s", file=sys.stderr)
        built[name] = candidate
    return built


def measure(name: str, names: list[str], precision: str, rounds: int, device: str) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    built = build(names, shape, precision, random_batch(shape, device))
    peaks: list[float] = []
    gemm = Candidate(lambda: peaks.append(gemm_peak(PRECISIONS[precision], rounds=3, device=device)), 0)
    steps = {key: candidate.step for key, candidate in ({"GEMM": gemm} | built).items()}
    seconds = interleaved(steps, warmup=WARMUP, rounds=rounds, device=device)
    rows = []
    for key, candidate in built.items():
        rates = [shape["B"] * shape["T"] / t for t in seconds[key]]
        median, best, worst = median_and_spread(rates)
        flops = flops_per_token(shape, candidate.matmul_parameters)
        rows.append(
            {"shape": name, "candidate": key, "precision": precision, "tokens_per_s": median, "best": best}
            | {"worst": worst, "mfu": median * flops / max(peaks), "mfu_best": best * flops / max(peaks)}
            | {"peak_gflops": max(peaks) / 1e9, "seconds": seconds[key]}
        )
    return rows


def peak_memory(name: str, candidate: str, precision: str, args: argparse.Namespace) -> dict[str, int] | None:
    """Bytes in a process of its own: `libraries` before the model exists, `peak` after some steps."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        candidate,
        "--shape",
        name,
        "--precision",
        precision,
    ]
    command += ["--device", args.device, "--threads", str(args.threads)]
    command += ["--rows", str(args.rows)] if args.rows else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {candidate}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(args: argparse.Namespace) -> None:
    if args.child.startswith("niels-gpt"):
        keep_freed_memory()  # as our runs do
    else:
        import transformers  # noqa: F401
    shape = SHAPES[args.shape]
    batch = random_batch(shape, args.device)
    libraries = device_peak(args.device)
    candidate = ALL[args.child](shape, args.precision, batch)
    for _ in range(MEMORY_STEPS):
        candidate.step()
    print(json.dumps({"libraries": libraries, "peak": device_peak(args.device)}))


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| step | tok/s | best..worst | of GEMM peak | ours is x | peak memory (libraries) |\n|---|---|---|---|---|---|"
    )
    by_name = {row["candidate"]: row for row in rows}
    for row in rows:
        ours = "niels-gpt, AdamW" + (", dropout 0.1" if "dropout" in row["candidate"] else "")
        if "compiled" in row["candidate"] and (compiled := ours.replace("AdamW", "AdamW, compiled")) in by_name:
            ours = compiled
        ratio = f"{by_name[ours]['tokens_per_s'] / row['tokens_per_s']:.2f}" if ours in by_name else ""
        memory = row.get("memory")
        size = f"{memory['peak'] / 1e6:.0f} MB ({memory['libraries'] / 1e6:.0f})" if memory else ""
        spread = f"{row['best']:.0f}..{row['worst']:.0f}"
        cells = (row["candidate"], f"{row['tokens_per_s']:.0f}", spread, f"{row['mfu']:.1%}", ratio, size)
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nGEMM peak of this run: {rows[0]['peak_gflops']:.0f} GFLOP/s ({rows[0]['precision']})" if rows else "")


def show_targets(name: str, rows: list[dict[str, Any]]) -> None:
    """What the project wants to reach at this shape, and what was reached."""
    found = {row["candidate"]: row for row in rows}
    for ours, other, at_default, at_quickstart in TARGETS:
        wanted = {"default": at_default, "quickstart": at_quickstart}.get(name)
        if wanted is None or ours not in found or (other is not None and other not in found):
            continue
        for variant in (ours, ours.replace("AdamW", "AdamW, compiled")):
            if (row := found.get(variant)) is None:
                continue
            if other is None:
                print(f"- {variant}: {row['mfu']:.3f} of the GEMM peak (target {wanted})")
                continue
            reached = row["tokens_per_s"] / found[other]["tokens_per_s"]
            pairs = zip(row["seconds"], found[other]["seconds"], strict=True)
            rounds = sorted(theirs / mine for mine, theirs in pairs)
            spread = f"rounds {rounds[0]:.2f}..{rounds[-1]:.2f}"
            print(f"- {variant}: {reached:.2f} x {other} (target {wanted}; {spread})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each candidate (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, metavar="B", help="rows of a step, instead of the shape's own")
    parser.add_argument("--precision", choices=[*PRECISIONS], help="default: fp32 on CPUs, bf16 on GPUs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only these, by name or a part of it")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, a process for each")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--child", choices=[*ALL], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    target = Path(args.json).resolve() if args.json else None
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # where the loop keeps its run folder
        if args.child:
            child(args)
            return 0
        rows = run(args)
    if target is not None:
        target.write_text(json.dumps({"machine": machine(args.device), "rows": rows}, indent=2) + "\n")
    return 0


def chosen(texts: list[str]) -> list[str]:
    """Candidates named in full, or whose name holds a text that is nobody's name."""
    return [name for name in ALL if any(text == name or (text not in ALL and text in name) for text in texts)]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    keep_freed_memory()
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    for shape in SHAPES.values() if args.rows else ():
        shape["B"] = args.rows
    print(machine(args.device))
    on_cpu = args.device == "cpu"
    groups = [list(WITHOUT_DROPOUT), list(WITH_DROPOUT)] if on_cpu else [list(ON_GPU)]
    default_shapes = ("quickstart", "default") if on_cpu else ("default", "gpt2")
    rows: list[dict[str, Any]] = []
    for name in default_shapes if args.shape == "all" else (args.shape,):
        print(f"\n{name}: {SHAPES[name]}\n")
        of_shape: list[dict[str, Any]] = []
        for names in [chosen(args.only)] if args.only else groups:
            measured = measure(name, names, args.precision, args.rounds, args.device)
            for row in measured if not args.no_memory else ():
                row["memory"] = peak_memory(name, row["candidate"], args.precision, args)
            show(measured)
            of_shape += measured
        print()
        show_targets(name, of_shape)
        rows += of_shape
    return rows


if __name__ == "__main__":
    sys.exit(main())
