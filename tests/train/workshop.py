"""A tiny world to train in: the shipped primer as text and as chats, cached in a folder, and settings for it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.sft import build_sft
from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.settings import validate_overrides
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.loop import Loop
from niels_gpt.train.pretrain import pretrain_job
from niels_gpt.train.report import Reporter
from niels_gpt.train.sft import sft_job
from niels_gpt.train.start import start_phase

ROOT = Path(__file__).resolve().parents[2]
V, T = 512, 32


def overrides(folder: Path, tokenizer: SentencePieceTokenizer, *, steps: int = 12, **phase: Any) -> dict[str, Any]:
    """Settings of a two-block model with dropout on; `phase` goes to both phases."""
    common = {
        "micro_B": 4,
        "accum_steps": 2,
        "total_steps": steps,
        "warmup_steps": 3,
        "eval_every": 5,
        "eval_steps": 2,
        "ckpt_every": 4,
        "log_every": 1,
        "base_lr": 0.01,
        "min_lr": 0.001,
        "amp": False,
        "optimizer": "muon",
        "tensorboard": False,  # loading its library takes as long as training here
        **phase,
    }
    return {
        "tokenizer": {"model_path": str(tokenizer.model_path), "vocab_size": V},
        "model": {"V": V, "T": T, "C": 32, "L": 2, "H": 2, "d_ff": 64, "dropout": 0.1},
        "data": {
            "caches": {
                "pretrain_token_cache": str(folder / "cache/pretrain"),
                "sft_token_cache": str(folder / "cache/sft"),
            },
            "primer": {"t_max": T + 1},
            "mix_pretrain": {"primer": 1.0},
            "mix_sft": {"primer": 1.0},
            "val_pretrain_source": "primer",
        },
        "training": {"pretrain": dict(common), "sft": dict(common)},
        "reproducibility": {"torch_num_threads": 1},
    }


def build_caches(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    """The caches of `overrides`: built once beside the tokenizer, and copied from there."""
    assert tokenizer.model_path is not None
    made = tokenizer.model_path.with_name("workshop")
    if not made.is_dir():
        settings = validate_overrides(overrides(made, tokenizer))
        caches = settings.data.caches
        build_pretrain(settings, tokenizer, "primer", root=caches.pretrain_token_cache)
        build_sft(settings, tokenizer, "primer", root=caches.sft_token_cache)
    shutil.copytree(made / "cache", folder / "cache")


def make_loop(config: dict[str, Any], phase: str = "pretrain", *, resume: bool = False, **changes: Any) -> Loop:
    """A loop of the config with `changes` to the phase's settings; with `resume`, on from its newest checkpoint."""
    config["training"][phase] |= changes
    start = start_phase(phase, config, device="cpu", resume_path=None, no_auto_resume=not resume)
    job = pretrain_job(start) if phase == "pretrain" else sft_job(start)
    reporter = Reporter(phase, start.resolved.run_id, quiet=True)
    return Loop(job, device="cpu", reporter=reporter, resume=start.resume, init=None)


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loop.model.state_dict().items()}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "train.run", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(folder: Path, *arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m train.run` in `folder` to its end."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def steps_logged(folder: Path, phase: str = "pretrain") -> dict[int, str]:
    """step -> exact loss, over all metrics files of a phase in the folder."""
    found: dict[int, str] = {}
    for path in sorted(folder.glob("runs/*/metrics.jsonl"), key=lambda p: p.stat().st_mtime_ns):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # being written, or cut by a kill
                continue
            if entry["kind"] == "step" and entry["phase"] == phase:
                found[entry["step"]] = entry["loss_hex"]
    return found


def kill_at(folder: Path, phase: str, step: int, rng: random.Random, *arguments: str | Path) -> None:
    """Start training and SIGKILL it a random instant after it has logged `step`."""
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while max(steps_logged(folder, phase), default=0) < step:
        assert process.poll() is None, f"training ended by itself before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)
    time.sleep(rng.random() * 0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()


def weights_sha(checkpoint: Path) -> str:
    """sha256 over every weight and optimizer tensor of a checkpoint."""
    content = load_checkpoint(checkpoint, device="cpu")
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            digest.update(repr(value).encode())

    feed(content["model_state"])
    feed(content["optimizer_state"])
    return digest.hexdigest()
