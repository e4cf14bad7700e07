"""Measuring every validation source of a job: leaves when a signal asks for it, makes do with little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from niels_gpt.batching import Batch
from niels_gpt.device import Precision
from niels_gpt.eval import EvalResult, evaluate
from niels_gpt.model.gpt import GPT
from niels_gpt.train.job import Job
from niels_gpt.train.memory import advice, free_memory, is_out_of_memory
from niels_gpt.train.signals import StopRequest


class _Stopped(Exception):
    pass


class Evaluation:
    """The validation sources of a job and how many rows of them fit into memory at once."""

    def __init__(self, job: Job, model: GPT, *, device: str, precision: Precision, warn: Callable[[str], None]) -> None:
        self.job, self.model, self.device, self.precision, self.warn = job, model, device, precision, warn
        self.most_rows: int | None = None  # None: batches as they come
        self._seen_rows = 0

    def measure(self, stop: StopRequest) -> dict[str, EvalResult] | None:
        """Name -> result of every source; None if `stop` was set meanwhile."""
        try:
            return {name: self._source(batches, stop) for name, batches in self.job.evals.items()}
        except _Stopped:
            return None

    def _source(self, batches: Callable[[], Iterable[Batch]], stop: StopRequest) -> EvalResult:
        while True:
            failure: Exception | None = None
            try:
                cut = self._cut(batches(), stop)
                return evaluate(
                    self.model,
                    cut,
                    device=self.device,
                    precision=self.precision,
                    byte_lengths=self.job.byte_lengths,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)
            free_memory(self.device)
            self._shrink(failure)

    def _cut(self, batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
        """The same rows in batches of at most `most_rows`."""
        for batch in batches:
            rows = len(batch.x)
            size = min(rows, self.most_rows or rows)
            for first in range(0, rows, size):
                if stop:
                    raise _Stopped
                self._seen_rows = size
                part = slice(first, first + size)
                yield Batch(batch.x[part], batch.y[part], None if batch.segment is None else batch.segment[part])

    def _shrink(self, failure: Exception) -> None:
        phase = self.job.phase
        if self._seen_rows <= 1:
            raise ValueError(f"out of memory while evaluating a single row ({failure}): {advice(phase)}")
        self.most_rows = self._seen_rows // 2
        self.warn(
            f"out of memory while evaluating {self._seen_rows} rows at once; going on with {self.most_rows}."
            f" Set training.{phase}.micro_B_eval to {self.most_rows} to start this way"
        )
