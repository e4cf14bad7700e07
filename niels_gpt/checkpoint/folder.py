"""Where a phase's checkpoints live: `checkpoints/<phase>/{step_*,latest,best}.pt`, and copies in `checkpoints/`.

A step file is the one commit point. `publish` may be killed anywhere: what it does again after a resume is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt import files, paths
from niels_gpt.checkpoint.format import disk_full_explained, is_good
from niels_gpt.settings import PHASES

FEWEST_KEPT = 2


@dataclass(frozen=True)
class PhasePaths:
    """Where one phase's checkpoints are."""

    latest: Path
    best: Path
    step_dir: Path


def phase_paths(phase: str) -> PhasePaths:
    """Paths of a phase under `paths.CHECKPOINT_DIR` as it is now; ValueError for an unknown phase."""
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; choose one of {', '.join(PHASES)}")
    folder = paths.CHECKPOINT_DIR / phase
    return PhasePaths(latest=folder / "latest.pt", best=folder / "best.pt", step_dir=folder)


def step_path(phase: str, step: int) -> Path:
    """The periodic checkpoint of a step: seven digits, more when needed."""
    return phase_paths(phase).step_dir / f"step_{step:07d}.pt"


def sidecar_path(checkpoint: Path) -> Path:
    """Where the resolved settings beside a checkpoint file go."""
    return checkpoint.with_name(checkpoint.name + ".resolved_settings.json")


def prepare_phase(phase: str) -> PhasePaths:
    """Make a phase's folder and sweep what killed writers left in it and in the root; call once at the start."""
    found = phase_paths(phase)
    found.step_dir.mkdir(parents=True, exist_ok=True)
    for folder in (found.step_dir, paths.CHECKPOINT_DIR):
        files.sweep_temporaries(folder)
    return found


def publish(
    phase: str,
    step: int,
    *,
    is_best: bool,
    keep_last: int,
    keep_every: int | None = None,
    sidecar: Mapping[str, Any] | None = None,
    spared: Iterable[Path] = (),
) -> PhasePaths:
    """Make the durable step file the phase's latest (and best) and the root's, each with its sidecar; then thin out.

    The best goes first: if the process dies in between, a resume from the older latest reaches this step again.
    Of the older step files the newest `keep_last` (at least 2) that match their checksums stay, with those in `spared`,
    the one that is the best, and those of every `keep_every`-th step.
    """
    source, found = step_path(phase, step), phase_paths(phase)
    targets = [found.best, paths.CHECKPOINT_DIR / found.best.name] if is_best else []
    targets += [found.latest, paths.CHECKPOINT_DIR / found.latest.name]
    with disk_full_explained(source, source.stat().st_size):
        _write_sidecar(source, sidecar)
        for target in targets:
            files.publish_copy(source, target)
            _write_sidecar(target, sidecar)
    _thin_out(found, keep_last, keep_every, spared=[source, found.best, *spared])
    return found


def _write_sidecar(checkpoint: Path, sidecar: Mapping[str, Any] | None) -> None:
    if sidecar is None:
        sidecar_path(checkpoint).unlink(missing_ok=True)  # an older run's would describe other weights
    else:
        files.write_json(sidecar_path(checkpoint), dict(sidecar))


def _step_files(found: PhasePaths) -> list[Path]:
    """Step files, newest first by time of writing: a fresh run in an old folder starts again at low numbers."""
    return sorted(found.step_dir.glob("step_*.pt"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def _thin_out(found: PhasePaths, keep_last: int, keep_every: int | None, spared: Iterable[Path]) -> None:
    wanted = max(FEWEST_KEPT, keep_last)
    newest_first = _step_files(found)
    if len(newest_first) <= wanted:
        return
    there = [path for path in spared if path.exists()]
    good = 0
    for path in newest_first:
        if good < wanted:
            good += is_good(path)
        elif not (_is_milestone(path, keep_every) or any(path.samefile(other) for other in there)):
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)


def _is_milestone(path: Path, keep_every: int | None) -> bool:
    number = path.stem.removeprefix("step_")
    return keep_every is not None and number.isdecimal() and int(number) % keep_every == 0


def newest_good(phase: str, *, instead: str = "start afresh with --no-resume") -> Path | None:
    """The checkpoint to go on from: latest.pt if it is sound, else the newest sound step file, else best.pt.

    None if the phase has neither latest.pt nor step files. Damage is reported on stderr. ValueError if nothing is
    sound, so that a long run is never silently started afresh; `instead` is what it advises besides restoring one.
    """
    found = phase_paths(phase)
    candidates = [path for path in (found.latest, *_step_files(found)) if path.exists()]
    if not candidates:
        return None
    damaged: list[Path] = []
    for path in [*candidates, *([found.best] if found.best.exists() else [])]:
        if is_good(path):
            if damaged:
                names = ", ".join(p.name for p in damaged)
                print(f"WARNING: {names} in {found.step_dir} DAMAGED; going back to {path.name}", file=sys.stderr)
            return path
        damaged.append(path)
    raise ValueError(
        f"every checkpoint in {found.step_dir} is damaged ({', '.join(p.name for p in damaged)});"
        f" restore one, or {instead}"
    )
