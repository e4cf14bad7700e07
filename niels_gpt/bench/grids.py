"""What a sweep tries: a preset that fits the device's kind and memory, or the list in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt.bench.trial import Trial
from niels_gpt.config import ModelConfig
from niels_gpt.device import Precision
from niels_gpt.files import read_json
from niels_gpt.settings import Settings, validate_overrides

MEDIUM_GIB, LARGE_GIB = 10, 16  # of a GPU's memory, rounded as cards are sold
MLP_RATIO = 3  # d_ff / C of the presets
SHAPE = ("T", "C", "L", "H", "d_ff")
OPTIONAL = ("amp", "amp_dtype", "activation_checkpointing")  # as the settings have them, where an entry has not


@dataclass(frozen=True)
class Candidate:
    """One configuration of a sweep; what of it is searched is the microbatch."""

    model: ModelConfig
    amp: bool | str
    amp_dtype: str
    activation_checkpointing: bool

    @property
    def name(self) -> str:
        m = self.model
        amp = self.amp_dtype if self.amp is True else "fp32" if self.amp is False else "amp auto"
        checkpointing = ", checkpointing" if self.activation_checkpointing else ""
        return f"T{m.T} C{m.C} L{m.L} H{m.H} {amp}{checkpointing}"

    def trial(self, settings: Settings, device: str) -> Trial:
        """Its trial of one row, everything else as in `settings`."""
        bench = settings.benchmark
        return Trial(
            device=device,
            model=self.model,
            amp=self.amp,
            amp_dtype=self.amp_dtype,
            activation_checkpointing=self.activation_checkpointing,
            micro_B=1,
            steps_warmup=bench.steps_warmup,
            steps_measure=bench.steps_measure,
            seed=bench.seed,
            settings=Trial.of(settings, device=device).settings,
        )


def preset(settings: Settings, precision: Precision, memory: int) -> list[Candidate]:
    """The grid for a device. precision: what training would use there. memory: bytes, looked at on CUDA only."""
    bench, device = settings.benchmark, precision.device
    dims, lengths, modes = bench.candidate_model_dims, bench.candidate_T, bench.checkpointing_modes
    gib = round(memory / 2**30)
    if device == "cpu":
        dims, lengths, modes = bench.cpu_model_dims, bench.cpu_T, (False,)
    elif device == "cuda" and gib < LARGE_GIB:
        dims, lengths = dims[: 1 if gib < MEDIUM_GIB else 2], bench.small_T
    asked = settings.training.pretrain.amp_dtype
    return [
        Candidate(
            _model(settings, {"T": T, "C": d.C, "L": d.L, "H": d.H, "d_ff": MLP_RATIO * d.C}),
            amp=precision.dtype is not None,
            amp_dtype=asked if precision.dtype is None else precision.name,
            activation_checkpointing=mode,
        )
        for T in lengths
        for d in dims
        for mode in modes
    ]


def from_file(path: str | Path, settings: Settings) -> list[Candidate]:
    """A JSON list of {T, C, L, H, d_ff, amp, amp_dtype, activation_checkpointing}; the last three may be left out.

    Raises: ValueError naming the entry and what is wrong with it, OSError.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a JSON list of objects with {', '.join([*SHAPE, *OPTIONAL])}")
    found = []
    for number, entry in enumerate(entries, start=1):
        try:
            found.append(_candidate(entry, settings))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from None
    return list(dict.fromkeys(found))


def _candidate(entry: Any, settings: Settings) -> Candidate:
    if not isinstance(entry, Mapping):
        raise ValueError(f"must be an object, not {entry!r:.60}")
    if unknown := [str(key) for key in entry if key not in SHAPE and key not in OPTIONAL]:
        raise ValueError(f"unknown key {unknown[0]!r:.60}; the keys are {', '.join([*SHAPE, *OPTIONAL])}")
    if missing := [key for key in SHAPE if key not in entry]:
        raise ValueError(f"lacks {', '.join(missing)}")
    given = {key: entry[key] for key in OPTIONAL if key in entry}
    validate_overrides({"model": {key: entry[key] for key in SHAPE}, "training": {"pretrain": given}})
    phase = settings.training.pretrain.model_dump(include=set(OPTIONAL)) | given
    return Candidate(_model(settings, entry), **phase)


def _model(settings: Settings, shape: Mapping[str, Any]) -> ModelConfig:
    """Vocabulary, dropout and rope_theta are the settings'."""
    rest = {name: getattr(settings.model, name) for name in ModelConfig.__dataclass_fields__}
    return ModelConfig(**{**rest, **{key: shape[key] for key in SHAPE}})
