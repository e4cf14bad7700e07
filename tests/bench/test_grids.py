"""Which configurations a sweep tries: by kind and memory of the device, or as a file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from niels_gpt.bench.grids import Candidate, from_file, preset
from niels_gpt.device import automatic_precision
from niels_gpt.settings import Settings, validate_overrides

GIB = 2**30
FULL, CONSERVATIVE, MEDIUM = ({512, 1024}, 3), ({256, 512}, 1), ({256, 512}, 2)


@pytest.mark.parametrize(
    ("device", "capability", "gib", "shape", "amp"),
    [
        ("cuda", (7, 5), 8.0, CONSERVATIVE, "fp16"),  # RTX 2080
        ("cuda", (8, 6), 7.8, CONSERVATIVE, "bf16"),  # RTX 3070
        ("cuda", (8, 6), 9.8, MEDIUM, "bf16"),  # RTX 3080: sold as 10 GB
        ("cuda", (8, 9), 12.0, MEDIUM, "bf16"),  # RTX 4070
        ("cuda", (7, 5), 14.6, MEDIUM, "fp16"),  # T4
        ("cuda", (8, 9), 15.99, FULL, "bf16"),
        ("cuda", (8, 6), 23.7, FULL, "bf16"),  # RTX 3090
        ("mps", (0, 0), 8.0, FULL, None),
        ("cpu", (0, 0), 64.0, ({128}, 1), None),
    ],
)
def test_the_preset_fits_the_device(
    device: str, capability: tuple[int, int], gib: float, shape: tuple[set[int], int], amp: str | None
) -> None:
    precision = automatic_precision(device, capability, cpu_bf16=False)
    found = preset(Settings(), precision, int(gib * GIB))
    assert {c.model.T for c in found} == shape[0]
    assert len({(c.model.C, c.model.L, c.model.H) for c in found}) == shape[1]
    assert {(c.amp, c.amp_dtype if c.amp else None) for c in found} == {(amp is not None, amp)}
    assert {c.activation_checkpointing for c in found} == ({False} if device == "cpu" else {False, True})
    assert all(c.model.d_ff == 3 * c.model.C and c.model.V == Settings().model.V for c in found)
    if device == "cpu":
        assert (found[0].model.C, found[0].model.L, found[0].model.H) == (256, 4, 4)


def test_the_preset_is_what_the_settings_say() -> None:
    settings = validate_overrides(
        {
            "model": {"V": 512, "dropout": 0.0, "rope_theta": 500.0},
            "benchmark": {"candidate_T": [64], "candidate_model_dims": [{"C": 64, "L": 2, "H": 2}]},
        }
    )
    found = preset(settings, automatic_precision("mps", (0, 0), cpu_bf16=False), 0)
    assert [(c.model.V, c.model.T, c.model.C, c.model.dropout, c.model.rope_theta) for c in found] == [
        (512, 64, 64, 0.0, 500.0)
    ] * 2


ENTRY = {"T": 32, "C": 32, "L": 1, "H": 2, "d_ff": 64, "amp": False, "amp_dtype": "bf16"}


def test_a_grid_file_names_the_configurations(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps([ENTRY, {**ENTRY, "activation_checkpointing": True}, ENTRY]))
    first, second = from_file(path, Settings())
    assert isinstance(first, Candidate) and (first.model.T, first.amp, first.amp_dtype) == (32, False, "bf16")
    assert (first.activation_checkpointing, second.activation_checkpointing) == (False, True)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "must be a JSON list"),
        ([], "must be a JSON list"),
        ([ENTRY, 3], "entry 2: must be an object"),
        ([{**ENTRY, "t": 32}], "entry 1: unknown key 't'"),
        ([{k: v for k, v in ENTRY.items() if k != "d_ff"}], "entry 1: lacks d_ff"),
        ([{**ENTRY, "T": "32"}], "model.T: must be a whole number"),
        ([{**ENTRY, "H": 5}], "not divisible"),
        ([{**ENTRY, "amp_dtype": "fp8"}], "amp_dtype: must be one of"),
    ],
)
def test_what_is_wrong_in_a_grid_file_is_named(tmp_path: Path, entries: object, said: str) -> None:
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=said):
        from_file(path, Settings())
