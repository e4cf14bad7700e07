"""What a phase hands to the loop: its settings, where batches come from, and what is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from niels_gpt.batching import Batch
from niels_gpt.eval import EvalResult
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import PhaseSettings, ResolvedSettings
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.sample import Sample


@dataclass(frozen=True)
class Job:
    """One phase of training, ready to run."""

    phase: str
    resolved: ResolvedSettings
    batch: Callable[[int, int], Batch]  # (first, n) -> rows first .. first + n - 1 of the run; no hidden state
    evals: Mapping[str, Callable[[], Iterable[Batch]]]  # name, such as "wikitext" -> the same batches every time
    metric: Callable[[Mapping[str, EvalResult]], float]  # what best.pt minimises
    tokenizer_model: bytes | None = None  # goes into every checkpoint, so that one file can chat
    world: World = ALONE  # the processes that share the work
    data: Mapping[str, object] = field(default_factory=dict)  # fingerprint of what is learnt from
    byte_lengths: np.ndarray | None = None  # UTF-8 bytes of each id, for bits per byte
    sample: Callable[[GPT], Sample | None] | None = None  # a text of the model as it is now
    began: float | None = None  # `time.perf_counter()` when the phase began, before caches were opened
    deadline: float | None = None  # `time.time()` at which it must be over

    @property
    def options(self) -> PhaseSettings:
        return self.resolved.training
