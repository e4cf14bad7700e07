"""What the checkpoints of a folder say: which run saved them, how far it got, and which one a phase goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt import checkpoint as ckpt
from niels_gpt import paths


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of the run that saved it; published ones say only their step."""

    step: int
    resume: Mapping[str, Any]  # its `resume` record

    @property
    def run_id(self) -> str | None:
        return self.resume.get("run_id")

    @property
    def seconds(self) -> float:
        """Over all sessions."""
        return float(self.resume.get("elapsed_s", 0.0))

    @property
    def folder(self) -> Path:
        """Where the run keeps its metrics."""
        return paths.RUNS_DIR / str(self.run_id)


def read(checkpoint: Path) -> Saved:
    """What a checkpoint says. FileNotFoundError or ValueError if it is none."""
    return said_by(ckpt.load_checkpoint(checkpoint, device="cpu"))


def said_by(loaded: ckpt.Checkpoint) -> Saved:
    """What a checkpoint that is loaded says."""
    return Saved(loaded["step"], loaded["resume"] or {})


def saved_by(phase: str, checkpoint: Path | None) -> Saved | None:
    """What a checkpoint says; None without one, and for one that another phase has saved."""
    found = read(checkpoint) if checkpoint is not None else None
    return found if found is not None and is_of_phase(found.resume, phase) else None


def newest(phase: str) -> Saved | None:
    """What the newest sound checkpoint of a phase says, if there is one."""
    return saved_by(phase, ckpt.newest_good(phase))


def is_of_phase(resume: Mapping[str, Any], phase: str) -> bool:
    """Whether a checkpoint's `resume` record was saved by this phase; one that does not say counts as such."""
    return bool(resume.get("phase", phase) == phase)


def find_resume(phase: str, resume_path: str | Path | None, no_auto_resume: bool) -> Path | None:
    """`--resume PATH` first, then `--no-resume`, else the newest sound checkpoint of this phase (never the root's)."""
    if resume_path is not None:
        path = Path(resume_path)
        if not path.is_file():
            raise FileNotFoundError(f"cannot resume: there is no checkpoint at {path}")
        return path
    return None if no_auto_resume else ckpt.newest_good(phase)


def spent_seconds(phase: str, resume_path: str | Path | None, no_auto_resume: bool) -> float:
    """Seconds that earlier sessions have used of the run that a phase would go on with; 0 for a fresh one."""
    found = saved_by(phase, find_resume(phase, resume_path, no_auto_resume))
    return 0.0 if found is None else found.seconds


def pretrained_model() -> Path:
    """The checkpoint fine-tuning starts from: pretraining's best, or its newest where the best is of an older run.

    RuntimeError if there is none, ValueError if all of them are damaged.
    """
    found = ckpt.phase_paths("pretrain")
    latest = ckpt.newest_good("pretrain", instead="pretrain again: --phase pretrain --no-resume")
    if found.best.is_file() and (latest is None or read(found.best).run_id == read(latest).run_id):
        return found.best
    if latest is None:
        raise RuntimeError(f"pretraining left no checkpoint in {found.step_dir}; run --phase pretrain first")
    return latest
