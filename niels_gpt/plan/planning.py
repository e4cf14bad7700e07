"""From hours to a plan: read the text, measure the machine, rank the candidates; and the plan as a file"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from niels_gpt import files
from niels_gpt.plan import probe
from niels_gpt.plan.candidates import Candidate, Question, candidates, shapes
from niels_gpt.plan.cost import Costs, Measured
from niels_gpt.plan.law import KNOWN_TEXT, Law, Scale, shipped_law
from niels_gpt.plan.limits import Limits, limits_here
from niels_gpt.plan.recipe import Shape, seeded, tuned
from niels_gpt.plan.text import PRIMER, Text, checked_sources, mix_of, read_text
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.settings.errors import reworded

FORMAT, VERSION = "niels-gpt plan", 1
SHORTEST, LONGEST = 0.05, 100.0  # hours
UNKNOWN_ERROR = 0.08  # standard deviation of the logarithm of a text's factor that nobody has measured
LEAST_PROBE_S = 15.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What was asked, what was found, and what was chosen."""

    hours: float
    seed: int
    machine: Limits
    text: Text
    candidates: Sequence[Candidate]  # best first
    measured: Sequence[Measured]
    probe_s: float
    known_text: bool  # whether the curve was fitted to text of this source

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def settings(self) -> Settings:
        return validate_overrides(self.chosen.overrides)

    def record(self) -> dict[str, Any]:
        """The plan as JSON values; `settings` is complete and what `train --plan` runs."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "hours": self.hours,
            "seed": self.seed,
            "device": self.machine.device,
            "machine": asdict(self.machine),
            "probe_s": round(self.probe_s, 1),
            "text": {
                **asdict(self.text),
                "unique_tokens": round(self.text.unique_tokens),
                "cache_bytes": round(self.text.cache_bytes),
            },
            "validation_source": self.settings.data.val_pretrain_source,
            "known_text": self.known_text,
            "measured": [asdict(m) for m in self.measured],
            "chosen": _facts(self.chosen),
            "candidates": [_facts(c) for c in self.candidates],
            "settings": self.settings.model_dump(mode="json"),
        }


def _facts(candidate: Candidate) -> dict[str, Any]:
    facts = candidate.facts()
    facts["settings"] = facts.pop("overrides")
    return facts


def make_plan(
    hours: float,
    *,
    device: str | None = None,
    sources: Sequence[str] | None = None,
    seed: int,
    memory_bytes: int | None = None,
    folder: Path,
    say: Say,
    law: Law | None = None,
    run: probe.Runner | None = None,
) -> Plan:
    """Measure for a minute and choose. ValueError/OSError for what cannot be planned; `run` measures a trial."""
    began = time.monotonic()
    overrides = seeded(tuned(), seed)
    if sources is not None:
        overrides = on_sources(overrides, sources)
    settings = validate_overrides(overrides)
    machine = limits_here(device, settings.training.pretrain, folder, memory_bytes=memory_bytes)
    text = read_text(settings, say)
    if sources is not None:
        overrides = _with_mix(overrides, settings, text)
        settings = validate_overrides(overrides)
    law = law or shipped_law()
    source = settings.data.val_pretrain_source
    scale = law.scale_of(source)
    question = Question(hours, settings, overrides, text, machine, law, scale or Scale(KNOWN_TEXT, UNKNOWN_ERROR))
    costs = probe.measure(
        overrides,
        shapes(settings),
        device=machine.device,
        seconds=max(LEAST_PROBE_S, settings.plan.probe_s - (time.monotonic() - began)),
        rank=lambda known: _ranked(question, known),
        say=say,
        **({} if run is None else {"run": run}),
    )
    ranked = candidates(question, costs)
    return Plan(hours, seed, machine, text, ranked, costs.measured, time.monotonic() - began, scale is not None)


def _ranked(question: Question, costs: Costs) -> list[Shape]:
    return [candidate.shape for candidate in candidates(question, costs)]


def on_sources(overrides: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """The recipe on other text; the shares are preliminary until it is counted."""
    names = checked_sources(sources)
    if set(names) == set(overrides["data"]["mix_pretrain"]):
        return {**overrides}
    others = [name for name in names if name != PRIMER]
    primer = overrides["data"]["mix_pretrain"][PRIMER]
    data = {
        **overrides["data"],
        "mix_pretrain": mix_of(names, primer, dict.fromkeys(others, 1.0)),
        "val_pretrain_source": others[0] if others else PRIMER,
        "caches": {
            **overrides["data"].get("caches", {}),
            "pretrain_token_cache": "data/cache/plan/pretrain",
            "sft_token_cache": "data/cache/plan/sft",
        },
    }
    tokenizer = {**overrides["tokenizer"], "model_path": "artifacts/tokenizer/plan/spm.model"}
    return {**overrides, "data": data, "tokenizer": tokenizer}


def _with_mix(overrides: Mapping[str, Any], settings: Settings, text: Text) -> dict[str, Any]:
    """Each source by its size."""
    sizes = {source.name: float(source.train_bytes) for source in text.pretrain}
    mix = mix_of(list(sizes), settings.data.mix_pretrain.get(PRIMER, 1.0), sizes)
    return {**overrides, "data": {**overrides["data"], "mix_pretrain": mix}}


def read_plan(path: Path) -> dict[str, Any]:
    """A plan's record; FileNotFoundError, or ValueError for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no plan at {path}; make one with niels-gpt plan --hours 1 --out {path}")
    found = files.read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no plan; make one with niels-gpt plan --hours 1 --out {path}")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path} is a plan of version {found.get('version')}, this program reads {VERSION}; plan again"
        )
    try:
        _Needed.model_validate(found, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path} was changed: {'; '.join(reworded(error))}; plan again") from None
    return found


class _NeededSeconds(BaseModel):
    pretrain: float
    sft: float
    evaluation: float


class _NeededPrediction(BaseModel):
    bpb: float
    low: float
    high: float


class _NeededChosen(BaseModel):
    name: str
    seconds: _NeededSeconds
    total_seconds: float
    evaluated_windows: int | None
    prediction: _NeededPrediction
    peak_bytes: float
    disk_bytes: float
    tokens: float


class _Needed(BaseModel):
    """What carrying out a plan reads of it."""

    hours: float
    seed: int
    device: str
    settings: dict[str, Any]
    chosen: _NeededChosen
