"""A trial of a model so small that what is measured takes milliseconds."""

from __future__ import annotations

from niels_gpt.bench.trial import Trial

MODEL = {"V": 64, "T": 4, "C": 8, "L": 1, "H": 2, "d_ff": 8, "dropout": 0.0, "rope_theta": 10000.0}


def tiny_trial(micro_B: int = 1, **changes: object) -> Trial:
    values = {"device": "cpu", "model": MODEL, "amp": False, "micro_B": micro_B, "steps_warmup": 0, "steps_measure": 1}
    return Trial.from_dict({**values, **changes})
