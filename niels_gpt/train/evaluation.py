"""Measuring every validation source of a job: leaves when a signal asks for it, makes do with little memory.

Several processes deal the batches out among themselves. The sum is taken in the order of the batches, so that the
result is the same to the bit, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest

from niels_gpt.batching import Batch
from niels_gpt.device import Precision
from niels_gpt.eval import BitsPerByte, EvalResult, evaluate
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.train.job import Job
from niels_gpt.train.memory import advice, free_memory, is_out_of_memory
from niels_gpt.train.parallel import settle
from niels_gpt.train.signals import StopRequest

OUT_OF_MEMORY = 1 << 16  # beside the numbers of signals


class _Stopped(Exception):
    pass


class Evaluation:
    """The validation sources of a job and how many rows of them fit into memory at once."""

    def __init__(self, job: Job, model: GPT, *, device: str, precision: Precision, warn: Callable[[str], None]) -> None:
        self.world = job.world
        self.job, self.model, self.device, self.precision, self.warn = job, model, device, precision, warn
        self.most_rows: int | None = None  # None: batches as they come
        self._seen_rows = 0

    def measure(self, stop: StopRequest) -> dict[str, EvalResult] | None:
        """Name -> result of every source; None if `stop` was set meanwhile, in this process or another."""
        try:
            return {name: self._source(batches, stop) for name, batches in self.job.evals.items()}
        except _Stopped:
            return None

    def _source(self, batches: Callable[[], Iterable[Batch]], stop: StopRequest) -> EvalResult:
        while True:
            found = self._tried(batches(), stop)
            if isinstance(found, EvalResult):
                return found
            free_memory(self.device)
            self._shrink(found)

    def _tried(self, batches: Iterable[Batch], stop: StopRequest) -> EvalResult | str:
        """The result, or why memory did not suffice."""
        mine: list[EvalResult] = []
        counted = (batch for batch in self._cut(batches) if bool((batch.y != IGNORED).any()))
        while together := list(islice(counted, self.world.size)):
            # One that has no batch of its own in the last round takes part with the first: FSDP needs everybody.
            has_own = self.world.rank < len(together)
            batch, failure = together[self.world.rank if has_own else 0], ""
            try:
                result = evaluate(
                    self.model,
                    [batch],
                    device=self.device,
                    precision=self.precision,
                    byte_lengths=self.job.byte_lengths,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            else:
                mine += [result] if has_own else []
            said = self.world.largest(OUT_OF_MEMORY if failure else stop.signum)
            if said == OUT_OF_MEMORY:
                return failure or "another process"
            if said:
                raise _Stopped
        settle(self.model)
        in_order = [one for row in zip_longest(*self.world.gather(mine)) for one in row if one is not None]
        text = BitsPerByte(sum(one.text.nats for one in in_order), sum(one.text.text_bytes for one in in_order))
        return EvalResult(sum(one.nats for one in in_order), sum(one.tokens for one in in_order), text)

    def _cut(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same rows in batches of at most `most_rows`."""
        for batch in batches:
            rows = len(batch.x)
            size = min(rows, self.most_rows or rows)
            for first in range(0, rows, size):
                self._seen_rows = size
                part = slice(first, first + size)
                yield Batch(batch.x[part], batch.y[part], None if batch.segment is None else batch.segment[part])

    def _shrink(self, failure: str) -> None:
        phase = self.job.phase
        if self._seen_rows <= 1:
            raise ValueError(f"out of memory while evaluating a single row ({failure}): {advice(phase)}")
        self.most_rows = self._seen_rows // 2
        self.warn(
            f"out of memory while evaluating {self._seen_rows} rows at once; going on with {self.most_rows}."
            f" Set training.{phase}.micro_B_eval to {self.most_rows} to start this way"
        )
