"""`niels-gpt train --plan plan.json`: tokenizer, caches, both phases and a last measurement, in the time planned

The whole takes what the plan says, from the start of the program: training gets what preparing has left. At the end
stands what was planned beside what came of it; both are kept in the folders of the runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from niels_gpt import checkpoint as ckpt
from niels_gpt import files, paths
from niels_gpt.cache.pretrain import open_mix
from niels_gpt.console import OutputConsole, wide_console
from niels_gpt.device import peak_memory, resolve_device
from niels_gpt.eval import held_out_bits
from niels_gpt.plan.candidates import step_tokens
from niels_gpt.plan.planning import read_plan
from niels_gpt.plan.table import clock
from niels_gpt.settings import PHASES, Settings, validate_overrides
from niels_gpt.train.distributed import is_torchrun
from niels_gpt.train.lineage import Saved, newest
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.pipeline import run_pipeline
from niels_gpt.train.prepare import Say, compile_kernels, make_caches, make_tokenizer, set_other_runs_aside, stage
from niels_gpt.train.start import TimeLimit

KEPT = "plan.json"  # in the folder of a run
LEAST_SHARE = 0.5  # of the planned training time that is trained even when preparing took all of it


def run_planned(path: Path, *, device: str | None = None, no_resume: bool = False) -> dict[str, Any]:
    """Carry out a plan in the current folder, or go on where it was stopped; returns what came of it.

    Raises: FileNotFoundError or ValueError for a file that is no plan, and what preparing and training raise.
    """
    if is_torchrun():
        raise ValueError("a plan is for one process; start it without torchrun")
    began = psutil.Process().create_time()
    record = read_plan(path)
    settings, chosen = validate_overrides(record["settings"]), record["chosen"]
    chosen_device = _device_of(record, device, path)
    console = OutputConsole()
    total = chosen["total_seconds"]
    console.print(f"{path}: {chosen['name']}, {clock(total)} in {Path.cwd()}", markup=False)
    tokenizer = stage(console, "1/4 tokenizer", lambda say: make_tokenizer(settings, record["seed"], say))
    stage(console, "2/4 caches", lambda say: make_caches(settings, tokenizer, say))
    compile_kernels(settings, chosen_device, console)
    with only_training_here():
        set_other_runs_aside(settings, console, any_budget=True)
        earlier = 0.0 if no_resume else sum(saved.seconds for saved in _newest().values())
        planned = chosen["seconds"]
        left = total - (time.time() - began) - planned["evaluation"]
        training = max(left, LEAST_SHARE * (planned["pretrain"] + planned["sft"]))
        console.print(f"[3/4 training] {clock(training)}", markup=False)
        try:
            run_pipeline(
                record["settings"], device=chosen_device, no_auto_resume=no_resume, limit=TimeLimit(training / 60)
            )
        finally:
            trained = _newest()
            runs = [saved.folder for saved in trained.values() if saved.folder.is_dir()]
            _keep(record, runs)
    windows = chosen["evaluated_windows"]
    bits = stage(console, "4/4 evaluation", lambda say: _bits(settings, chosen_device, windows, say))
    steps = {phase: saved.step for phase, saved in trained.items()}
    actual = {
        "seconds": earlier + time.time() - began,
        "peak_bytes": peak_memory(chosen_device),
        "disk_bytes": disk_use(_made(settings, runs)),
        "bpb": bits,
        "steps": steps,
        "tokens": sum(n * step_tokens(settings, phase) for phase, n in steps.items()),
    }
    _keep({**record, "actual": actual}, runs)
    wide_console().print(comparison(chosen, actual))
    best = paths.CHECKPOINT_DIR / "best.pt"
    console.print(f"talk to it: niels-gpt chat --ckpt {best}", markup=False)
    return actual


def _device_of(record: Mapping[str, Any], asked: str | None, path: Path) -> str:
    try:
        return resolve_device(asked or record["device"])
    except ValueError as error:
        if asked is not None:
            raise
        raise ValueError(
            f"{path} was made for {record['device']}, which is not here; plan again on this machine, or give --device"
        ) from error


def _bits(settings: Settings, device: str, windows: int | None, say: Say) -> float:
    """Bits per byte of held-out text of the finished model."""
    loaded = ckpt.load_model(paths.CHECKPOINT_DIR / "best.pt", device=device)
    name = settings.data.val_pretrain_source
    stream = open_mix(settings, loaded.tokenizer, "val", settings.model.T)[0][name]
    found = held_out_bits(loaded.model, stream, loaded.tokenizer, settings, max_windows=windows)
    say(f"{found.value:.4f} bits per byte of {name} ({found.text_bytes:,} bytes)")
    return found.value


def _newest() -> dict[str, Saved]:
    found = {phase: newest(phase) for phase in PHASES}
    return {phase: saved for phase, saved in found.items() if saved is not None}


def _keep(record: Mapping[str, Any], runs: Iterable[Path]) -> None:
    """Put the plan into the folders of its runs."""
    for folder in runs:
        files.write_json(folder / KEPT, dict(record))


def _made(settings: Settings, runs: Iterable[Path]) -> list[Path]:
    """What a plan leaves on disk."""
    caches = settings.data.caches
    folders = [Path(settings.tokenizer.model_path).parent]
    folders += [Path(caches.pretrain_token_cache) / name for name in settings.data.mix_pretrain]
    folders += [Path(caches.sft_token_cache) / name for name in settings.data.mix_sft]
    return [*folders, paths.CHECKPOINT_DIR, *runs]


def disk_use(folders: Iterable[Path]) -> int:
    """Bytes of all files below, those with several names once."""
    seen: dict[tuple[int, int], int] = {}
    for path in _files(folders):
        status = path.stat()
        seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def comparison(chosen: Mapping[str, Any], actual: Mapping[str, Any]) -> Table:
    """Planned beside actual."""
    table = Table(title="planned and actual", title_justify="left")
    for column in ("", "planned", "actual", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    p = chosen["prediction"]
    inside = "inside the band" if p["low"] <= actual["bpb"] <= p["high"] else "OUTSIDE THE BAND"
    table.add_row(
        "wall time",
        clock(chosen["total_seconds"]),
        clock(actual["seconds"]),
        _away(chosen["total_seconds"], actual["seconds"]),
    )
    for name, key, unit in (("peak memory", "peak_bytes", 1e6), ("disk", "disk_bytes", 1e6)):
        figures = (f"{chosen[key] / unit:,.1f} MB", f"{actual[key] / unit:,.1f} MB")
        table.add_row(name, *figures, _away(chosen[key], actual[key]))
    table.add_row(
        "tokens", f"{chosen['tokens']:,.0f}", f"{actual['tokens']:,}", _away(chosen["tokens"], actual["tokens"])
    )
    table.add_row(
        "bits per byte",
        f"{p['bpb']:.3f} ({p['low']:.3f}-{p['high']:.3f})",
        f"{actual['bpb']:.4f}",
        f"{_away(p['bpb'], actual['bpb'])}, {inside}",
    )
    return table


def _away(planned: float, actual: float) -> str:
    return f"{actual / planned - 1:+.1%}"
