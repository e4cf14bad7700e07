"""The two systems of the quality benchmark, trained under one clock: this project, and transformers' Trainer

Both are given minutes, not steps; both are measured at the same shares of their time with the clock stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niels_gpt.device import choose_precision, resolve_device
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.train.budget import Budget
from niels_gpt.train.loop import Loop, train
from niels_gpt.train.pretrain import PHASE, pretrain_job
from niels_gpt.train.report import Reporter, StepReport
from niels_gpt.train.start import TimeLimit, start_phase
from tools.bench_common import KEYS, hugging_face_twin
from tools.quality_text import Text, open_text

OURS, PEER = "ours", "peer"
ENDLESS = 10**9  # steps: the clock ends the peer's run


@dataclass(frozen=True)
class Spec:
    """One run: which system, for how long, and where its text is."""

    system: str  # "ours" | "peer"
    minutes: float
    seed: int
    overrides: dict[str, Any]  # this project's settings; the peer takes its text, shape and batch from them
    windows: int  # of held-out text, at every point of the curve
    points: int
    threads: int
    lr: float | None = None  # of the peer
    batch: int | None = None  # rows of a step of the peer

    @property
    def name(self) -> str:
        return OURS if self.system == OURS else f"{PEER} {self.lr:g} x{self.batch}"

    @property
    def label(self) -> str:
        """The name, and for how long: one of its kind among the runs of a round."""
        return f"{self.name}, {self.minutes:g} min"

    @property
    def rows(self) -> int:
        """Rows of one optimizer step."""
        options = validate_overrides(self.overrides).training.pretrain
        return self.batch or options.rows


@dataclass(frozen=True)
class Point:
    """Held-out bits per byte after so much training time."""

    minutes: float
    bits: float
    tokens: int


@dataclass(frozen=True)
class Run:
    """What a run has come to."""

    system: str
    name: str
    lr: float | None
    batch: int
    minutes: float  # as asked for; the last point has the time taken
    threads: int
    seed: int
    parameters: int
    precision: str
    points: list[Point]
    final_bits: float  # of all held-out text, after training

    @property
    def tokens_per_second(self) -> float:
        last = self.points[-1]
        return last.tokens / (60 * last.minutes)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> Run:
        """Raises TypeError for a record of another shape."""
        return Run(**{**record, "points": [Point(**point) for point in record["points"]]})


class Clock:
    """Seconds of training: from `start` on, but for what was paused."""

    def __init__(self) -> None:
        self._began = self._left_out = 0.0

    def start(self) -> None:
        self._began, self._left_out = time.perf_counter(), 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began - self._left_out

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - began


Say = Callable[[Point], None]


class Course:
    """The curve of a run while it is made: when to measure, and what was measured."""

    def __init__(self, spec: Spec, text: Text, *, device: str, ready: Callable[[], None], say: Say) -> None:
        """ready: called once before the clock starts, such as to wait for the other runs."""
        options = text.settings.training.pretrain
        self.spec, self.text, self.device, self._ready, self._say = spec, text, device, ready, say
        self.precision = choose_precision(device, options.amp, options.amp_dtype)
        self.clock, self.points = Clock(), list[Point]()

    @property
    def seconds(self) -> float:
        return self.spec.minutes * 60

    def start(self, model: nn.Module) -> None:
        """Measure the untrained model, wait for the others, start the clock."""
        bits = self.text.bits(model, device=self.device, precision=self.precision)
        self._ready()
        self.clock.start()
        self._add(Point(0.0, bits, 0))

    def step(self, model: nn.Module, tokens: int) -> None:
        """After a step: measure if it is time. The end of the run is measured by `end`."""
        if self.clock.elapsed / self.seconds * self.spec.points >= len(self.points) < self.spec.points:
            self._measure(model, tokens)

    def end(self, model: nn.Module, tokens: int) -> Run:
        self._measure(model, tokens)
        everything = self.text.bits(model, device=self.device, precision=self.precision, everything=True)
        spec = self.spec
        parameters = sum(p.numel() for p in model.parameters())
        about = (spec.system, spec.name, spec.lr, spec.rows, spec.minutes, spec.threads, spec.seed)
        return Run(*about, parameters, self.precision.name, self.points, everything)

    def _measure(self, model: nn.Module, tokens: int) -> None:
        minutes = self.clock.elapsed / 60
        with self.clock.paused():
            bits = self.text.bits(model, device=self.device, precision=self.precision)
            self._add(Point(minutes, bits, tokens))

    def _add(self, point: Point) -> None:
        self.points.append(point)
        self._say(point)


def run(spec: Spec, *, ready: Callable[[], None] = lambda: None, say: Say = lambda point: None) -> Run:
    """Train one system in the current folder and measure it on the way."""
    course = Course(spec, open_text(spec.overrides, spec.windows), device=resolve_device(None), ready=ready, say=say)
    return (run_ours if spec.system == OURS else run_peer)(course)


# ---- this project


class ClockBudget(Budget):
    """The run's time budget on a clock that stops for the benchmark's own measurements."""

    def __init__(self, loop: Loop, clock: Clock) -> None:
        super().__init__(loop.options)
        self.clock = clock

    @property
    def elapsed(self) -> float:
        return self.clock.elapsed


class Watcher(Reporter):
    """Measures where the loop reports; everything else a run writes is written as ever, and counts."""

    def __init__(self, course: Course, run_id: str) -> None:
        super().__init__(PHASE, run_id, quiet=True)
        self.course = course
        self.loop: Loop | None = None
        self.result: Run | None = None

    def start(self, loop: Loop) -> None:
        super().start(loop)
        self.loop = loop
        self.course.start(loop.model)
        loop.budget = ClockBudget(loop, self.course.clock)

    def step(self, report: StepReport) -> None:
        super().step(report)
        assert self.loop is not None
        self.course.step(self.loop.model, report.tokens_seen)

    def finish(self, step: int, elapsed: float) -> None:
        super().finish(step, elapsed)
        assert self.loop is not None
        self.result = self.course.end(self.loop.model, self.loop.state.tokens_seen)


def run_ours(course: Course) -> Run:
    """Pretraining by the project's own settings and loop, its checkpoints and metrics included."""
    limit = TimeLimit(course.spec.minutes)
    start = start_phase(
        PHASE, course.spec.overrides, device=course.device, resume_path=None, no_auto_resume=True, limit=limit
    )
    # The course evaluates, so the loop need not: a metric that never changes keeps it content.
    job = dataclasses.replace(pretrain_job(start), evals={}, sample=None, metric=lambda evals: 0.0)
    watcher = Watcher(course, start.resolved.run_id)
    try:
        train(job, device=start.device, reporter=watcher)
    finally:
        watcher.close()
    assert watcher.result is not None
    return watcher.result


# ---- transformers


class Blocks(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Blocks of T tokens as the Trainer wants them; the model shifts the labels by itself."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = torch.from_numpy(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


class Scored(nn.Module):
    """A transformers model behind the face that `eval.evaluate` knows."""

    def __init__(self, model: nn.Module, T: int) -> None:
        super().__init__()
        self.model, self.cfg = model, SimpleNamespace(T=T)

    def forward(self, x: Tensor, y: Tensor, *, segment: None = None, apart: Tensor | None = None) -> Tensor:
        """Summed nats over targets y, 0-d; with `apart`, of them and over those targets as well, (2,)."""
        nats = -self.model(input_ids=x, use_cache=False).logits.float().log_softmax(dim=-1)
        targets = [y] if apart is None else [y, apart]
        sums = [nats.gather(2, t.clamp_min(0)[..., None])[..., 0].masked_fill(t == IGNORED, 0).sum() for t in targets]
        return sums[0] if apart is None else torch.stack(sums)


def llama(settings: Settings) -> nn.Module:
    """LlamaForCausalLM of this project's shape, without QK-norm and dropout, which Llama does not have."""
    return hugging_face_twin({key: getattr(settings.model, key) for key in KEYS}, "Llama")


def run_peer(course: Course) -> Run:
    """Llama and the Trainer at its defaults: fused AdamW, linear decay to 0, clipping at 1, its own dataloader.

    Its schedule follows the clock, as ours does: that is what the best guess of `max_steps` would give, and no slow
    minute of the machine can spoil the guess. It evaluates, saves and logs nothing by itself. Its process has Python's
    usual allocator: what ours tells glibc (`device.keep_freed_memory`) is part of ours.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    spec, settings = course.spec, course.text.settings
    T, rows = settings.model.T, spec.rows
    set_seed(spec.seed)
    model = llama(settings)
    scored = Scored(model, T)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            course.start(scored)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = course.clock.elapsed >= course.seconds
            if not control.should_training_stop:
                course.step(scored, state.global_step * rows * T)

    class OnTheClock(Trainer):  # type: ignore[misc]
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: max(0.0, 1 - course.clock.elapsed / course.seconds) if step else 1.0,
            )
            return self.lr_scheduler

    args = TrainingArguments(
        output_dir=str(Path("trainer").resolve()),
        learning_rate=spec.lr,
        per_device_train_batch_size=rows,
        max_steps=ENDLESS,
        seed=spec.seed,
        use_cpu=course.device == "cpu",
        bf16=course.precision.dtype is torch.bfloat16,
        fp16=course.precision.dtype is torch.float16,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = OnTheClock(model=model, args=args, train_dataset=Blocks(course.text.blocks()), callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return course.end(scored, trainer.state.global_step * rows * T)
