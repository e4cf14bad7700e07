"""What a run says while it goes on: log lines or a progress bar, `runs/<id>/metrics.jsonl`, TensorBoard, a chart."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from niels_gpt import files, paths
from niels_gpt.console import OutputConsole
from niels_gpt.eval import EvalResult
from niels_gpt.train.bar import Bar
from niels_gpt.train.board import Board, open_board
from niels_gpt.train.chart import Chart
from niels_gpt.train.clock import ActivityClock, time_table
from niels_gpt.train.distributed import World
from niels_gpt.train.metrics import MetricsFile
from niels_gpt.train.mfu import matmul_peak, training_flops
from niels_gpt.train.sample import Sample
from niels_gpt.train.start import Start

if TYPE_CHECKING:
    from niels_gpt.train.loop import Loop

RATE_WINDOW = 50  # steps that the shown rate is a mean of
BOARD_POINTS = 10  # of a curve in TensorBoard between two log lines: each costs 0.1 ms of its thread
SFT_EVALS = ("pretrain", "sft")


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


class Rate:
    """Tokens per second over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW)
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if len(self._steps) == RATE_WINDOW:
            old_tokens, old_seconds = self._steps[0]
            self._tokens, self._seconds = self._tokens - old_tokens, self._seconds - old_seconds
        self._steps.append((tokens, seconds))
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds

    @property
    def value(self) -> float:
        return self._tokens / max(self._seconds, 1e-9)


class Reporter:
    """Prints and records one phase. `quiet` leaves only warnings and the bar."""

    def __init__(self, phase: str, run_id: str, *, quiet: bool = False, console: Console | None = None) -> None:
        self.phase, self.quiet = phase, quiet
        self.console = console or OutputConsole()
        self.output_closed = False  # nobody reads stdout, or stderr, any more: the loop saves and ends
        self.folder: Path = paths.RUNS_DIR / run_id
        self.clock = ActivityClock()
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.warn)
        self.chart = Chart(self.folder / "report.html", f"{run_id}: {phase}")
        self._board: Board | None = None
        self._bar: Bar | None = None
        self._rate = Rate()
        self._mfu_of_rate = 0.0  # FLOPs per token over the peak: times tokens/s it is the MFU
        self._memory = 0
        self._last_metric = "n/a"
        self._last_evals: dict[str, float] = {}
        self._last_bits = math.nan
        self._main_source = ""  # whose bits per byte are shown
        self._log_every = self._board_every = 1
        self._sft = phase == "sft"

    def say(self, line: str) -> None:
        if not self.quiet:
            encoding = self.console.encoding  # a model may write what this terminal or file cannot hold
            with self._writing(self.console):
                self.console.print(line.encode(encoding, "replace").decode(encoding), markup=False)

    def warn(self, line: str) -> None:
        console = OutputConsole(stderr=True)
        with self._writing(console):
            console.print(f"warning: {line}", markup=False)

    @contextmanager
    def _writing(self, console: Console) -> Iterator[None]:
        """Around output: that nobody reads it any more is noted, and what follows goes nowhere."""
        try:
            yield
        except OSError as error:
            if not files.is_closed_output(error):
                raise
            files.discard_output(console.file)
            self.output_closed = True

    def start(self, loop: Loop) -> None:
        """The line that says what runs, the peak that MFU refers to, and the bar when this is a terminal."""
        options, precision = loop.options, loop.precision
        self._log_every, self._board_every = options.log_every, max(1, options.log_every // BOARD_POINTS)
        self._main_source = "sft" if self._sft else loop.job.resolved.settings.data.val_pretrain_source
        self.say(
            f"{self.phase}: device={loop.device}, {precision.describe()}, "
            f"activation_checkpointing={options.activation_checkpointing}, micro_B={options.micro_B}, "
            f"accum_steps={options.accum_steps}, effective_batch={options.rows}, params={loop.model.num_parameters:,}"
        )
        peak, per_token = matmul_peak(precision), training_flops(loop.model)
        self._mfu_of_rate = per_token / (peak * loop.world.size)
        where = f"{precision.name}, {torch.get_num_threads()} threads" if loop.device == "cpu" else precision.name
        self.say(
            f"{self.phase}: {per_token / 1e6:,.1f} MFLOP per token; matrix products reach {peak / 1e9:,.0f} GFLOP/s "
            f"here ({where}), so MFU 100% = {peak / per_token:,.0f} tokens/s"
        )
        with self.clock("logging"):
            self._open(loop)

    def _open(self, loop: Loop) -> None:
        step = loop.state.step
        times = [entry["seconds"] for entry in self.forget_after(step) if entry["kind"] == "time"]
        self.clock.carry(times[-1] if times else {})
        if loop.options.tensorboard:
            self._board = open_board(self.folder / "tensorboard", step, say=self.say, warn=self.warn)
        if self.console.is_terminal:
            with self._writing(self.console):
                self._bar = Bar(self.phase, self.console)

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Drop what is on record of steps that will be taken again; returns what stays of this phase."""
        earlier = self.metrics.reopen(self.phase, step)
        self.chart.replace(earlier)
        if self._board is not None:
            self._board.forget_after(step)
        return earlier

    def step(self, report: StepReport) -> None:
        with self.clock("logging"):
            self._step(report)

    def _step(self, report: StepReport) -> None:
        mfu = report.tokens / report.seconds * self._mfu_of_rate
        entry = {"phase": self.phase, "kind": "step", "loss_hex": float(report.loss).hex(), **vars(report), "mfu": mfu}
        self.metrics.record(entry)
        self.chart.add(entry)
        self._rate.add(report.tokens, report.seconds)
        self._memory = report.memory or self._memory
        logs = report.step % self._log_every == 0
        if self._board is not None and report.step % self._board_every == 0:
            self._board.scalars(report.step, self._scalars(report, mfu))
        if self._bar is not None and (logs or self._bar.is_due()):
            with self._writing(self.console):
                self._bar.show(report.progress, self._pace(report))
        if logs:
            self.say(self._line(report))
            if self._bar is None:
                self.say(f"[{self.phase}] " + " | ".join(self._pace(report)))

    def _scalars(self, report: StepReport, mfu: float) -> dict[str, float]:
        values = {
            "train/loss": report.loss,
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "speed/tokens_per_s": report.tokens / report.seconds,
            "speed/mfu": mfu,
        }
        return {**values, "memory/bytes": report.memory} if report.memory else values

    def _pace(self, report: StepReport) -> list[str]:
        """What the bar shows, the most wanted first: a narrow terminal has room for the first few."""
        rate = self._rate.value
        parts = [
            f"{duration(report.remaining)} left",
            f"{rate:,.0f} tok/s",
            f"loss {report.mean_loss:.3f}",
            f"MFU {rate * self._mfu_of_rate:.0%}",
        ]
        if math.isfinite(self._last_bits):
            parts.append(f"val {self._last_bits:.3f} bpb")
        parts.append(f"lr {report.lr:.2g}")
        if self._memory:
            parts.append(f"{self._memory / 2**30:.2f} GiB")
        return parts

    def _line(self, r: StepReport) -> str:
        where = f"step {r.step} ({r.progress:.0%})" if r.total_steps is None else f"step {r.step}/{r.total_steps}"
        head = f"[{self.phase}] {where} | lr {r.lr:.6f} | train_loss {r.mean_loss:.4f}"
        if not self._sft:
            return f"{head} | last_val {self._last_metric}"
        shown = {name: f"{self._last_evals[name]:.4f}" if name in self._last_evals else "n/a" for name in SFT_EVALS}
        return f"{head} | val_pretrain {shown['pretrain']} | val_sft {shown['sft']}"

    def evaluated(
        self,
        step: int,
        evals: Mapping[str, EvalResult],
        metric: float,
        improved: bool,
        sample: Sample | None = None,
    ) -> None:
        with self.clock("logging"):
            self._evaluated(step, evals, metric, improved, sample)

    def _evaluated(
        self, step: int, evals: Mapping[str, EvalResult], metric: float, improved: bool, sample: Sample | None
    ) -> None:
        losses = {name: result.loss for name, result in evals.items()}
        bits = {name: result.text.value for name, result in evals.items() if result.text.text_bytes}
        self._last_evals = losses
        self._last_bits = bits.get(self._main_source, math.nan)
        if losses:
            self.say(f"[{self.phase}] " + " | ".join(f"val_{name}_loss {loss:.4f}" for name, loss in losses.items()))
            self._last_metric = f"{metric:.4f}"
        if bits:
            self.say(f"[{self.phase}] " + " | ".join(f"val_{name}_bpb {value:.4f}" for name, value in bits.items()))
        if sample is not None:
            self.say(f"[{self.phase}] sample: {one_line(sample.prompt)} -> {one_line(sample.text)}")
        if improved:
            self.say(f"[{self.phase}] new best checkpoint at step {step} (val_loss={metric:.4f})")
        entry = {
            "phase": self.phase,
            "kind": "eval",
            "step": step,
            "losses": losses,
            "bits_per_byte": bits,
            "metric": metric,
            "sample": None if sample is None else vars(sample),
        }
        self.metrics.record(entry)
        self.chart.add(entry)
        self.chart.write(self.warn)
        if self._board is not None:
            values = {f"val_loss/{name}": loss for name, loss in losses.items()}
            self._board.scalars(step, values | {f"val_bits_per_byte/{name}": value for name, value in bits.items()})
            if sample is not None:
                self._board.text(step, "sample", f"**{sample.prompt}** {sample.text}")

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a save; afterwards the time spent so far is on record, for a resumed run to go on from."""
        with self.clock("saving"):
            yield
        with self.clock("logging"):
            self._record_time(step)

    def _record_time(self, step: int) -> dict[str, float]:
        seconds = self.clock.seconds()
        self.metrics.record({"phase": self.phase, "kind": "time", "step": step, "seconds": seconds})
        return seconds

    def finish(self, step: int, elapsed: float) -> None:
        """The last words: how long it took, and where that time went."""
        with self.clock("logging"):
            self.chart.write(self.warn, final=True)
            self._close_files()
        seconds = self._record_time(step)
        self.close()
        self.say(f"[{self.phase}] finished {step} steps in {duration(elapsed)}")
        if not self.quiet:
            with self._writing(self.console):
                self.console.print(time_table(seconds))

    def _close_files(self) -> None:
        """TensorBoard's files; the metrics stay open for the last entry."""
        board, self._board = self._board, None
        if board is not None:
            board.close()

    def close(self) -> None:
        if self._bar is not None:
            with self._writing(self.console):
                self._bar.stop()
            self._bar = None
        self._close_files()
        self.metrics.close()


class NoReporter:
    """The reporter of a run's other processes: it takes whatever it is told and keeps it to itself."""

    def __init__(self) -> None:
        self.clock, self.output_closed = ActivityClock(), False

    def saving(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def reporter_for(world: World, phase: str, run_id: str, *, quiet: bool = False) -> Reporter:
    """A reporter for the main process of a run; the others get a mute one."""
    return Reporter(phase, run_id, quiet=quiet) if world.is_main else cast(Reporter, NoReporter())


@contextmanager
def reporting(start: Start, *, quiet: bool) -> Iterator[Reporter]:
    """The reporter of a phase about to run, which says what it goes on from; closed at the end."""
    reporter = reporter_for(start.world, start.resolved.phase, start.resolved.run_id, quiet=quiet)
    try:
        if start.resume is not None:
            reporter.say(f"resumed from {start.resume}")
        yield reporter
    finally:
        reporter.close()


def one_line(text: str) -> str:
    """A text of a model as one line that a terminal can show."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).strip()
