"""One trial: the real training step at one setting, timed in a fresh process, with what it took or why it failed.

`run_trial` starts `bench.trial_cli`, which measures with `bench.workload`. Whatever happens there, out of memory, a
kill or a crash, this process only gets a `Result`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from niels_gpt.child import run_module
from niels_gpt.config import ModelConfig
from niels_gpt.settings import Settings
from niels_gpt.train.memory import SIGNS

Status = Literal["ok", "oom", "timeout", "error"]
PROGRAM = "niels_gpt.bench.trial_cli"
KILLED = -9  # how the kernel ends a process when memory runs out
READ = {"model", "training", "reproducibility"}  # sections that a step depends on
KEPT_OUTPUT = 4000  # last characters of what a failed trial printed


@dataclass(frozen=True)
class Trial:
    """What to measure. `settings` are overrides below all that is named here: optimizer, compile, accum_steps ..."""

    device: str
    model: ModelConfig
    amp: bool | str  # true, false or "auto"
    amp_dtype: str  # of amp = true
    activation_checkpointing: bool
    micro_B: int
    steps_warmup: int
    steps_measure: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, *, device: str, micro_B: int | None = None) -> Trial:
        """The pretraining step that `settings` describe; micro_B: rows instead of theirs."""
        phase, bench = settings.training.pretrain, settings.benchmark
        values = settings.model.model_dump()
        return cls(
            device=device,
            model=ModelConfig.from_dict(values),
            amp=phase.amp,
            amp_dtype=phase.amp_dtype,
            activation_checkpointing=phase.activation_checkpointing,
            micro_B=phase.micro_B if micro_B is None else micro_B,
            steps_warmup=bench.steps_warmup,
            steps_measure=bench.steps_measure,
            seed=bench.seed,
            settings=settings.model_dump(mode="json", exclude_unset=True, include=READ),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """From JSON values; ValueError names what is missing or unknown. Absent steps and seed are the settings'."""
        names = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - names):
            raise ValueError(f"unknown key {unknown[0]!r}; a trial has {', '.join(sorted(names))}")
        defaults = Settings()
        given = {
            **{name: getattr(defaults.benchmark, name) for name in ("steps_warmup", "steps_measure", "seed")},
            **{name: getattr(defaults.training.pretrain, name) for name in ("amp", "amp_dtype")},
            "activation_checkpointing": defaults.training.pretrain.activation_checkpointing,
            **values,
        }
        if missing := [name for name in ("device", "model", "micro_B") if name not in given]:
            raise ValueError(f"the trial lacks {', '.join(missing)}")
        if not isinstance(given["model"], Mapping):
            raise ValueError(f"the trial's model must be an object with {', '.join(ModelConfig.__dataclass_fields__)}")
        return cls(**{**given, "model": ModelConfig.from_dict(dict(given["model"]))})

    def with_rows(self, micro_B: int) -> Trial:
        return replace(self, micro_B=micro_B)

    def as_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` takes back."""
        return asdict(self)

    def config(self) -> dict[str, Any]:
        """The fields that name a trial in results.jsonl."""
        names = ("device", "model", "amp", "amp_dtype", "activation_checkpointing", "micro_B")
        values = self.as_dict()
        return {name: values[name] for name in names}


@dataclass(frozen=True)
class Result:
    """What became of a trial. Figures are there when status is ok."""

    trial: Trial
    status: Status
    ms_per_step: float | None = None  # median of the measured optimizer steps
    tokens_per_sec: float | None = None
    peak_bytes: int | None = None  # of the device; on CPUs of the whole process, its libraries included
    params: int | None = None
    step_seconds: tuple[float, ...] = ()
    dtype_summary: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)  # MB
    compiled: bool = False  # whether the measured steps ran compiled
    message: str = ""  # what went wrong, or was done otherwise
    stdout: str = ""  # the last of what a failed trial printed
    stderr: str = ""
    seconds: float = 0.0  # the whole trial, with starting its process

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def run_trial(trial: Trial, timeout_s: float) -> Result:
    """Measure in a fresh process that is killed after `timeout_s`. Never raises for what goes wrong in there.

    A process that is killed from outside counts as out of memory: that is how Linux ends what takes too much.
    """
    ended = run_module(PROGRAM, "--trial", json.dumps(trial.as_dict()), timeout_s=timeout_s)
    if ended.code is None:
        return Result(trial, "timeout", message=f"not done after {timeout_s:g} s", seconds=ended.seconds)
    return replace(_understood(trial, ended.code, ended.stdout, ended.stderr), seconds=ended.seconds)


def _understood(trial: Trial, code: int, stdout: str, stderr: str) -> Result:
    """The result in the last line of a trial's output, or what its end without one means."""
    line = (stdout.strip().splitlines() or [""])[-1]
    with suppress(json.JSONDecodeError, TypeError, AttributeError):
        found = json.loads(line)
        if found.get("status") in ("ok", "oom") or (found.get("status") == "error" and code):
            return result_of(trial, found)
    if code == KILLED:
        return Result(trial, "oom", message="the process was killed, as the system does when memory runs out")
    if any(sign in stderr.lower() for sign in SIGNS):
        return Result(trial, "oom", message="memory ran out outside of PyTorch")
    last = (stderr.strip().splitlines() or ["it printed nothing"])[-1]
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    message = f"the trial {how} without a result: {last[:200]}"
    return Result(trial, "error", message=message, stdout=stdout[-KEPT_OUTPUT:], stderr=stderr[-KEPT_OUTPUT:])


def result_of(trial: Trial, found: Mapping[str, Any]) -> Result:
    """A result from the line that the trial's process printed, or from a line of results.jsonl."""
    names = set(Result.__dataclass_fields__) - {"trial", "step_seconds"}
    values = {name: value for name, value in found.items() if name in names}
    return Result(trial, step_seconds=tuple(found.get("step_seconds", ())), **values)


def row_of(result: Result) -> dict[str, Any]:
    """The line of results.jsonl, and of `bench_trial.py`'s output: what was tried, then what came of it."""
    row: dict[str, Any] = {"status": result.status, **result.trial.config()}
    if result.ok:
        row |= {
            "params": result.params,
            "ms_per_step": result.ms_per_step,
            "tokens_per_sec": result.tokens_per_sec,
            "dtype_summary": dict(result.dtype_summary),
            "memory": dict(result.memory),
            "peak_bytes": result.peak_bytes,
            "step_seconds": list(result.step_seconds),
            "compiled": result.compiled,
        }
    if result.message:
        row["message"] = result.message
    if result.status == "error":
        row |= {"stdout": result.stdout, "stderr": result.stderr}
    return row if not result.seconds else row | {"seconds": round(result.seconds, 2)}
