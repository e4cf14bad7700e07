"""kill -9 at random moments of a checkpoint writer: `python -m tests.checkpoint.killing SEED DIR KIND KILLS ...`.

A child is forked from a warmed-up process, saves step after step and reports each durable one over a pipe; the parent
kills it and looks at what is on disk. Every number of a checkpoint is its step, so half of one and half of another
show. Prints a JSON tally by kind: `ours`, and `naive`, a writer as tutorials have it: the harness must see it fail.
"""

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from niels_gpt import paths
from niels_gpt.checkpoint import load_checkpoint, newest_good, phase_paths, prepare_phase, publish, save_checkpoint
from niels_gpt.checkpoint import step_path as path_of
from niels_gpt.config import V2, ModelConfig, to_dict
from niels_gpt.model.gpt import GPT

CFG = ModelConfig(V=512, T=16, C=64, L=2, H=4, d_ff=128, dropout=0.0, rope_theta=10000.0)
SHAPES = {name: tensor.shape for name, tensor in GPT(CFG, V2).state_dict().items()}


def content(step: int) -> dict:
    """About 1 MB in which every number is the step."""
    state = {name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}
    state["lm_head.weight"] = state["tok_emb.weight"]
    moments = {i: {"exp_avg": torch.full((256, 512), float(step))} for i in range(3)}
    return {"model_state": state, "optimizer_state": {"state": moments, "param_groups": []}, "step": step}


def write_ours(step: int) -> None:
    now = content(step)
    save_checkpoint(
        path_of("pretrain", step),
        model_cfg=CFG,
        train_cfg={"seed": 0},
        model=now["model_state"],
        optimizer=now["optimizer_state"],
        step=step,
        best_val_loss=float(step),
        resume={"tokens_seen": step},
    )
    publish("pretrain", step, is_best=step % 2 == 0, keep_last=2, sidecar={"step": step})


def write_naive(step: int) -> None:
    latest = phase_paths("pretrain").latest
    torch.save({"model_cfg": to_dict(CFG), "train_cfg": {}, **content(step), "resume": {"tokens_seen": step}}, latest)


def child(write, first: int, pipe: int) -> None:
    try:
        step = first
        while True:
            write(step)
            os.write(pipe, step.to_bytes(4, "little"))
            step += 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def whole(path: Path) -> int | None:
    """The step of a checkpoint whose every part says the same, -1 if parts differ, None if it does not load."""
    try:
        found = load_checkpoint(path, device="cpu")
    except (OSError, ValueError):
        return None
    tensors = list(found["model_state"].values())
    tensors += [moments["exp_avg"] for moments in (found["optimizer_state"] or {"state": {}})["state"].values()]
    same = (found["resume"] or {}).get("tokens_seen") == found["step"]
    return found["step"] if same and all(bool((t == found["step"]).all()) for t in tensors) else -1


def main(kind: str, kills: int, seed: int, folder: str) -> dict[str, int]:
    paths.CHECKPOINT_DIR = Path(folder)
    draw, write = random.Random(seed), {"ours": write_ours, "naive": write_naive}[kind]
    tally = dict.fromkeys(("kills", "unloadable", "torn", "lost", "leftovers", "unswept", "children_failed"), 0)
    prepare_phase("pretrain")
    for _ in range(3):  # warms up torch.save and torch.load before any fork
        started = time.perf_counter()
        write(1)
        duration = time.perf_counter() - started
        whole(phase_paths("pretrain").latest)
    durable = 1
    while tally["kills"] < kills:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(write, durable + 1, writing)
        os.close(writing)
        select.select([reading], [], [], 10)  # running: the first step is durable
        time.sleep(draw.uniform(0, 2 * duration))
        os.kill(pid, signal.SIGKILL)
        tally["children_failed"] += not os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        acked = b"".join(iter(lambda fd=reading: os.read(fd, 4096), b""))
        os.close(reading)
        durable = int.from_bytes(acked[-4:], "little") if acked else durable
        tally["kills"] += 1
        check(kind, durable, tally)
        durable = max(durable, whole(phase_paths("pretrain").latest) or 0)
    return tally


def check(kind: str, durable: int, tally: dict[str, int]) -> None:
    root = paths.CHECKPOINT_DIR
    if kind == "ours":
        found = list({p.stat().st_ino: p for p in root.rglob("*.pt")}.values())  # hard links once
        named = newest_good("pretrain")
    else:
        found, named = [], phase_paths("pretrain").latest
    steps = {path: whole(path) for path in [*found, named] if path is not None}
    tally["unloadable"] += any(step is None for step in steps.values())
    tally["torn"] += any(step == -1 for step in steps.values())
    tally["lost"] += named is None or (steps[named] or 0) < durable
    tally["leftovers"] += len(list(root.rglob(".*.tmp")))
    prepare_phase("pretrain")
    tally["unswept"] += len(list(root.rglob(".*.tmp")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed, folder, *asked = sys.argv[1:]
    tallies = {
        kind: main(kind, int(kills), int(seed), f"{folder}/{kind}")
        for kind, kills in zip(asked[::2], asked[1::2], strict=True)
    }
    print(json.dumps(tallies))
