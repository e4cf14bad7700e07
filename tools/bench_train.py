"""Tokens/s of the real training step beside Hugging Face transformers at the same shape, in one run.

    python tools/bench_train.py [--shape quickstart|default] [--rounds 8] [--json FILE]

Ours is `train.loop.Loop.train_step` (forward, backward, clipping, update); theirs is Qwen3ForCausalLM with the same
precision, clipping and fused AdamW. MFU is against the best matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from niels_gpt.batching import Batch
from niels_gpt.settings import default_settings, resolve_settings
from niels_gpt.train.job import Job
from niels_gpt.train.loop import Loop
from niels_gpt.train.report import Reporter
from tools.bench_common import (
    KEYS,
    SHAPES,
    flops_per_token,
    gemm_peak,
    hugging_face_twin,
    interleaved,
    machine,
    median_and_spread,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def our_step(shape: dict[str, int], precision: str, optimizer: str, batch: Batch) -> Callable[[], Any]:
    model = {key: shape[key] for key in KEYS} | {"dropout": 0.0}
    phase: dict[str, Any] = {"micro_B": shape["B"], "optimizer": optimizer, "total_steps": 1000}
    phase |= {"amp": precision != "fp32", "amp_dtype": "bf16"}
    resolved = resolve_settings(
        "pretrain", {"model": model, "tokenizer": {"vocab_size": shape["V"]}, "training": {"pretrain": phase}}
    )
    job = Job("pretrain", resolved, lambda step, microbatch: batch, {}, lambda evals: float("nan"))
    loop = Loop(job, device="cpu", reporter=Reporter("pretrain", "bench", quiet=True), resume=None, init=None)
    return lambda: loop.train_step(0)


def their_step(shape: dict[str, int], precision: str, batch: Batch) -> Callable[[], Any]:
    model = hugging_face_twin(shape).train()
    ours = default_settings().training.pretrain
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ours.base_lr, betas=ours.betas, weight_decay=ours.weight_decay, fused=True
    )
    labels = torch.cat([batch.x[:, :1], batch.y[:, :-1]], dim=1)  # transformers shifts by itself

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=batch.x, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(name: str, rounds: int, precisions: list[str]) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape["V"], (shape["B"], shape["T"] + 1), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    steps: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        steps[f"transformers Qwen3, AdamW, {precision}"] = their_step(shape, precision, batch)
        steps[f"niels-gpt, AdamW, {precision}"] = our_step(shape, precision, "adamw", batch)
        steps[f"niels-gpt, Muon, {precision}"] = our_step(shape, precision, "muon", batch)
    seconds = interleaved(steps, warmup=2, rounds=rounds)
    peaks = {p: gemm_peak(PRECISIONS[p]) for p in precisions}
    per_step = shape["B"] * shape["T"]
    rows = []
    for candidate, times in seconds.items():
        precision = candidate.rsplit(" ", 1)[1]
        median, best, worst = median_and_spread([per_step / t for t in times])
        theirs = median_and_spread([per_step / t for t in seconds[f"transformers Qwen3, AdamW, {precision}"]])[0]
        rows.append(
            {
                "shape": name,
                "candidate": candidate,
                "tokens_per_s": round(median),
                "best": round(best),
                "worst": round(worst),
                "ratio": round(median / theirs, 2),
                "mfu": round(median * flops_per_token(shape) / peaks[precision], 3),
                "peak_gflops": round(peaks[precision] / 1e9),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each candidate (default: %(default)s)")
    parser.add_argument("--precision", choices=[*PRECISIONS, "both"], default="both")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    args = parser.parse_args(argv)
    print(machine())
    rows = []
    precisions = list(PRECISIONS) if args.precision == "both" else [args.precision]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the loop keeps its run folder here
        for name in SHAPES if args.shape == "all" else [args.shape]:
            print(f"\n{name}: {SHAPES[name]}\n")
            print("| step | tok/s | best..worst | x transformers | MFU |\n|---|---|---|---|---|")
            for row in measure(name, args.rounds, precisions):
                spread = f"{row['best']}..{row['worst']}"
                cells = (row["candidate"], row["tokens_per_s"], spread, row["ratio"], f"{row['mfu']:.0%}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                rows.append(row)
        os.chdir("/")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
