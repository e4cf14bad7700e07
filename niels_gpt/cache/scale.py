"""Building a pretraining cache on more than one machine: the same build as a datatrove pipeline (extra `scale`).

Many tasks read the source, and each encodes every n-th chunk of documents into a file of its own; one task then writes
the chunks in order with the writer of every other build, so the cache has the same bytes. All tasks need the same
folder (a shared file system) and the same source. Tasks that were killed are started again by the same command; those
that are done are not repeated.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt.cache.building import CachePlan, plan_cache, run, write_blocks
from niels_gpt.cache.encode import Block, Encoder
from niels_gpt.cache.folder import whole_folder
from niels_gpt.cache.integrity import open_folder
from niels_gpt.cache.writing import PretrainWriter
from niels_gpt.files import atomic_write
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

EXECUTORS = ("local", "slurm", "ray")
CHUNK_DOCUMENTS = 2000
MARGIN = 1.05  # how far past a budget the tasks go


@dataclass(frozen=True)
class Where:
    """Which executor runs the tasks, and how many of them read and encode; ValueError for what there is not."""

    executor: str
    tasks: int
    partition: str = "cpu"  # of Slurm
    time_limit: str = "24:00:00"  # of a task, for Slurm

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS or self.tasks < 1:
            known = ", ".join(EXECUTORS)
            raise ValueError(f"the executor is one of {known} and tasks at least 1, got {self.executor}, {self.tasks}")


@dataclass(frozen=True, repr=False)
class Job:
    """What every task must know to do its part; it is pickled."""

    settings: Settings
    model: bytes | None  # of the tokenizer; None for bytes
    source: str
    root: str
    budgets: dict[str, int | None]  # train_tokens, val_tokens as given

    def __repr__(self) -> str:
        return f"Job({self.source} -> {self.root})"  # the logs of datatrove show every step

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, from its bytes."""
        return ByteTokenizer() if self.model is None else SentencePieceTokenizer.from_bytes(self.model)

    def plan(self) -> CachePlan:
        """What the build makes; errors as for `plan_cache`."""
        return plan_cache(self.settings, self.tokenizer(), self.source, root=self.root, **self.budgets)

    def work(self) -> Path:
        """The folder of the chunks: another one for another result."""
        plan, sha = self.plan(), self.tokenizer().sha256 or "bytes"
        return plan.folder.with_name(f".{plan.folder.name}.{plan.fingerprint[:16]}.{sha[:16]}.tasks")


@dataclass(frozen=True)
class Read:
    """First step of a task: the documents of its chunks, as datatrove documents."""

    job: Job

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document

        plan, work = self.job.plan(), self.job.work()
        for part in plan.parts:
            ours: dict[int, int] = {}  # tokens of this task's chunks
            for chunk, batch in _chunks(plan.texts(self.job.settings, part)):
                if plan.budgets and _expected(ours, chunk) >= MARGIN * sum(plan.budgets.values()):
                    break
                if chunk % world_size != rank:
                    continue
                if not _path(work, part, chunk).is_file():
                    for i, text in enumerate(batch, start=chunk * CHUNK_DOCUMENTS):
                        yield Document(text, id=f"{part}/{i}", metadata={"part": part, "chunk": chunk})
                for done in (chunk, chunk - world_size):  # the next step may be a chunk behind
                    if done >= 0 and done not in ours and (found := _path(work, part, done)).is_file():
                        with np.load(found) as arrays:
                            ours[done] = int(arrays["ends"][-1])


@dataclass(frozen=True)
class Tokenize:
    """Last step of a task: a file of ids for every chunk."""

    job: Job

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        plan, work = self.job.plan(), self.job.work()
        with Encoder(self.job.tokenizer(), separate=plan.source.ends_documents, workers=1) as encoder:
            for (part, chunk), documents in groupby(data, key=lambda d: (d.metadata["part"], d.metadata["chunk"])):
                block = _encode(encoder, plan, part, chunk, [document.text for document in documents])
                with atomic_write(_path(work, part, chunk)) as file:
                    digests = np.frombuffer(b"".join(block.digests), dtype="u1")
                    np.savez(file, ids=block.ids, ends=block.ends, sizes=block.sizes, digests=digests)
        yield from ()


@dataclass(frozen=True)
class Write:
    """The one task at the end: the chunks in order, through the writer of every build."""

    job: Job

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        plan, work = self.job.plan(), self.job.work()

        def fill(writer: PretrainWriter) -> None:
            with Encoder(self.job.tokenizer(), separate=plan.source.ends_documents) as encoder:
                for part in plan.parts:
                    first = writer.consumed.get(part, 0)  # begins a chunk
                    write_blocks(writer, plan, part, self._blocks(plan, work, part, first, encoder))

        run(plan, self.job.tokenizer(), fill)
        shutil.rmtree(work / "chunks", ignore_errors=True)
        yield from ()

    def _blocks(self, plan: CachePlan, work: Path, part: str, first: int, encoder: Encoder) -> Iterator[Block]:
        """The chunks in order; those that the tasks left out, who can only guess where a budget ends, are made here."""
        if first % CHUNK_DOCUMENTS:  # a build on one machine was interrupted there
            texts = islice(plan.texts(self.job.settings, part), first, None)
            yield from encoder.blocks(texts, plan.source.name, first=first, lookup=lambda digest: None)
            return
        chunk = first // CHUNK_DOCUMENTS
        while (path := _path(work, part, chunk)).is_file():
            yield _load(path)
            chunk += 1
        for number, batch in _chunks(plan.texts(self.job.settings, part)):
            if number >= chunk:
                path = _path(work, part, number)
                yield _load(path) if path.is_file() else _encode(encoder, plan, part, number, batch)


def _load(path: Path) -> Block:
    with np.load(path) as found:
        digests = found["digests"].tobytes()
        cut = [digests[i : i + 16] for i in range(0, len(digests), 16)]
        return Block(found["ids"], found["ends"], found["sizes"], cut)


def _chunks(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    return enumerate(iter(lambda: list(islice(texts, CHUNK_DOCUMENTS)), []))


def _expected(ours: dict[int, int], chunk: int) -> float:
    """How many tokens the chunks before this one hold, to go by those of one task."""
    return sum(ours.values()) / len(ours) * chunk if ours else 0.0


def _encode(encoder: Encoder, plan: CachePlan, part: str, chunk: int, texts: list[str]) -> Block:
    """A chunk as one block, with the digests of its texts."""
    name, first = f"{plan.source.name}/{part}", chunk * CHUNK_DOCUMENTS
    blocks = list(encoder.blocks(texts, name, first=first, lookup=lambda digest: None))
    offsets = np.cumsum([0, *(len(block.ids) for block in blocks)])
    return Block(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.ends + offset for block, offset in zip(blocks, offsets, strict=False)]),
        np.concatenate([block.sizes for block in blocks]),
        [digest for block in blocks for digest in block.digests],
    )


def _path(work: Path, part: str, chunk: int) -> Path:
    return work / "chunks" / f"{part}_{chunk:08d}.npz"


def _slurm_options(where: Where) -> dict[str, Any]:
    """How Slurm runs the tasks: where, how long, and in the environment of this process, where they find datatrove."""
    if shutil.which("sbatch") is None:
        raise ValueError("there is no Slurm here (no program sbatch); start this where jobs are submitted from")
    activate = Path(sys.prefix) / "bin" / "activate"
    venv = str(activate) if activate.is_file() else None
    return {"time": where.time_limit, "partition": where.partition, "venv_path": venv}


def build_scaled(
    settings: Settings,
    tokenizer: Tokenizer,
    source: str,
    *,
    root: str | Path,
    where: Where,
    train_tokens: int | None = None,
    val_tokens: int | None = None,
) -> dict[str, Any] | None:
    """Build ROOT/SOURCE with a datatrove executor; returns its meta.json, or None where the tasks run later (Slurm).

    The bytes are those of `build_pretrain`.

    Raises:
        ValueError: datatrove or Slurm is not installed, or what `build_pretrain` raises.
        RuntimeError: a task failed; its log is named.
    """
    try:
        from datatrove import executor as engines
    except ImportError:
        hint = 'pip install "niels-gpt[scale]"'
        raise ValueError(f"building with an executor needs datatrove; install it with: {hint}") from None
    model = tokenizer.model_bytes if isinstance(tokenizer, SentencePieceTokenizer) else None
    budgets = {"train_tokens": train_tokens, "val_tokens": val_tokens}
    job = Job(settings, model, source, str(Path(root).absolute()), budgets)
    work, folder = job.work(), job.plan().folder
    logs = work / f"logs-{where.tasks}"
    encode = {"pipeline": [Read(job), Tokenize(job)], "tasks": where.tasks, "logging_dir": str(logs / "encode")}
    write = {"pipeline": [Write(job)], "tasks": 1, "logging_dir": str(logs / "write")}
    if where.executor == "slurm":
        options = _slurm_options(where)
        first = engines.SlurmPipelineExecutor(**encode, **options, job_name=f"{source}-encode")
        engines.SlurmPipelineExecutor(**write, **options, job_name=f"{source}-write", depends=first).run()
        return None
    engine = {"local": engines.LocalPipelineExecutor, "ray": engines.RayPipelineExecutor}[where.executor]
    try:
        for step in (encode, write):
            engine(**step, workers=step["tasks"]).run()
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"a task failed: {error}; the logs are in {work}") from error
    shutil.rmtree(work, ignore_errors=True)
    _, meta, _ = open_folder(folder.parent, whole_folder(folder).name)
    return meta
