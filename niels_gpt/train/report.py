"""What a run says while it goes on: log lines, a progress bar on a terminal, and `runs/<id>/metrics.jsonl`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from niels_gpt import paths
from niels_gpt.eval import EvalResult
from niels_gpt.files import write_text
from niels_gpt.train.distributed import World

if TYPE_CHECKING:
    from niels_gpt.train.loop import Loop


@dataclass(frozen=True)
class StepReport:
    """One step, as logged; `loss` is this step's, `mean_loss` the mean of the last 50 at most, both nats per token."""

    step: int
    total_steps: int | None  # None: the run ends by the clock
    progress: float  # 0..1
    lr: float
    loss: float
    mean_loss: float
    grad_norm: float
    tokens: int  # positions computed in this step
    tokens_seen: int  # supervised targets since the start
    seconds: float
    remaining: float  # seconds
    memory: int  # bytes; 0 when not measured at this step


def duration(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Reporter:
    """Prints and records one phase. `quiet` leaves only warnings and the bar."""

    def __init__(self, phase: str, run_id: str, *, quiet: bool = False, console: Console | None = None) -> None:
        self.phase, self.quiet = phase, quiet
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.metrics_path: Path = paths.RUNS_DIR / run_id / "metrics.jsonl"
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_metric = "n/a"
        self._log_every = 1
        self._sft = phase == "sft"
        self._last_evals: dict[str, float] = {}

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, markup=False)

    def warn(self, line: str) -> None:
        Console(file=sys.stderr, highlight=False, soft_wrap=True).print(f"warning: {line}", markup=False)

    def start(self, loop: Loop) -> None:
        """The line that says what runs, and the bar when this is a terminal."""
        options, precision = loop.options, loop.precision
        self._log_every = options.log_every
        effective = options.micro_B * options.accum_steps
        self.say(
            f"{self.phase}: device={loop.device}, {precision.describe()}, "
            f"activation_checkpointing={options.activation_checkpointing}, micro_B={options.micro_B}, "
            f"accum_steps={options.accum_steps}, effective_batch={effective}, params={loop.model.num_parameters:,}"
        )
        self.forget_after(loop.state.step)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
            self._bar = Progress(*columns, TextColumn("{task.fields[info]}"), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.phase, total=1.0, info="")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run takes again."""
        if not self.metrics_path.is_file():
            self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line a killed process was writing
                continue
            if entry.get("phase") != self.phase or entry.get("step", 0) <= step:
                kept.append(line)
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))

    def step(self, report: StepReport) -> None:
        entry = {"phase": self.phase, "kind": "step", "loss_hex": float(report.loss).hex(), **asdict(report)}
        self._record(entry)
        if self._bar is not None and self._task is not None:
            rate = report.tokens / report.seconds
            info = f"{rate:,.0f} tok/s  loss {report.mean_loss:.3f}  {duration(report.remaining)} left"
            self._bar.update(self._task, completed=report.progress, info=info)
        if report.step % self._log_every == 0:
            self.say(self._line(report))

    def _line(self, r: StepReport) -> str:
        where = f"step {r.step} ({r.progress:.0%})" if r.total_steps is None else f"step {r.step}/{r.total_steps}"
        head = f"[{self.phase}] {where} | lr {r.lr:.6f} | train_loss {r.mean_loss:.4f}"
        if not self._sft:
            return f"{head} | last_val {self._last_metric}"
        shown = {name: f"{self._last_evals[name]:.4f}" if name in self._last_evals else "n/a" for name in SFT_EVALS}
        return f"{head} | val_pretrain {shown['pretrain']} | val_sft {shown['sft']}"

    def evaluated(self, step: int, evals: Mapping[str, EvalResult], metric: float, improved: bool) -> None:
        losses = {name: result.loss for name, result in evals.items()}
        self._last_evals = losses
        if losses:
            label = " | ".join(f"val_{name}_loss {loss:.4f}" for name, loss in losses.items())
            self.say(f"[{self.phase}] {label}")
            self._last_metric = f"{metric:.4f}"
        if improved:
            self.say(f"[{self.phase}] new best checkpoint at step {step} (val_loss={metric:.4f})")
        self._record({"phase": self.phase, "kind": "eval", "step": step, "losses": losses, "metric": metric})

    def finish(self, step: int, elapsed: float) -> None:
        self.close()
        self.say(f"[{self.phase}] finished {step} steps in {duration(elapsed)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _record(self, entry: Mapping[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


class NoReporter:
    """The reporter of a run's other processes: it takes whatever it is told and keeps it to itself."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def reporter_for(world: World, phase: str, run_id: str, *, quiet: bool = False) -> Reporter:
    """A reporter for the main process of a run; the others get a mute one."""
    return Reporter(phase, run_id, quiet=quiet) if world.is_main else cast(Reporter, NoReporter())


SFT_EVALS = ("pretrain", "sft")
