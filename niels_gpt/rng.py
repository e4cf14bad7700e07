"""Randomness as a function, not a state.

Every random choice of a run is seeded from (run seed, purpose, step, microbatch). So a resumed run needs only its
step, the order of data does not depend on the number of processes, and nothing that logs, evaluates or samples can
disturb training.
"""

from __future__ import annotations

import hashlib

import torch


def seed_for(run_seed: int, purpose: str, step: int = 0, microbatch: int = 0) -> int:
    """A 63-bit seed; the same on every machine. `microbatch` is the global number within the step."""
    key = f"{run_seed}/{purpose}/{step}/{microbatch}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def generator_for(run_seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(run_seed, purpose, step))
