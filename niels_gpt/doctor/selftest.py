"""A run in miniature through the real code: train on the primer, save, load, and write some text; one line of JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict

from niels_gpt import paths
from niels_gpt.checkpoint import load_model
from niels_gpt.doctor.trying import Outcome
from niels_gpt.generate import generate_ids
from niels_gpt.train.pretrain import run_pretrain

CONFIG = "configs/doctor.json"
NEW_TOKENS = 16
PROMPT = b"user: hello"


def run(device: str) -> Outcome:
    """The self-test in this process and the current folder; ValueError, OSError or RuntimeError if something fails."""
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = round(time.perf_counter() - clock, 2), time.perf_counter()

    config = paths.shipped(CONFIG)
    trained = run_pretrain(config, device=device, no_auto_resume=True, quiet=True)
    lap("train and save")
    loss = float(trained["last_val_loss"])
    untrained = math.log(256)
    if not loss < untrained:
        raise RuntimeError(f"the model did not learn: {loss:.2f} nats after training, {untrained:.2f} before")
    loaded = load_model(trained["best_path"], device=device)
    lap("load")
    model = loaded.model
    ids = generate_ids(model, list(PROMPT), max_new_tokens=NEW_TOKENS, T=model.cfg.T, temperature=0.0)
    lap("decode")
    if len(ids) != len(PROMPT) + NEW_TOKENS:
        raise RuntimeError(f"the model wrote {len(ids) - len(PROMPT)} tokens instead of {NEW_TOKENS}")
    steps = trained["final_step"]
    return Outcome(
        "ok", f"{steps} steps brought the loss from {untrained:.2f} to {loss:.2f} nats; saved, loaded, decoded", seconds
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The doctor's self-test, in the current folder.")
    parser.add_argument("--device", required=True)
    args = parser.parse_args(argv)
    with redirect_stdout(sys.stderr):
        outcome = run(args.device)
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
