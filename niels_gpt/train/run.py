"""`python -m train.run`: pretraining, fine-tuning, or both in a row.

    python -m train.run --phase pretrain --config configs/pretrain.json [--device cpu|mps|cuda]
                        [--resume PATH | --no-resume] [--minutes X | --until HH:MM] [--print_config]
    python -m train.run --phase pipeline --config configs/pipeline.json --until 07:00
    python -m train.run --plan plan.json [--device cpu|mps|cuda] [--no-resume]

Exit code 0 when trained, 1 when it failed, 2 for wrong usage, 128+n when signal n stopped it (its state is saved).
docs/training.md tells how a run behaves that nobody watches.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from niels_gpt import paths
from niels_gpt.command import exit_status
from niels_gpt.device import resolve_device
from niels_gpt.plan.running import run_planned
from niels_gpt.settings import PHASES, resolve_settings
from niels_gpt.train.distributed import ALONE, MainFailed, World, joined
from niels_gpt.train.lineage import spent_seconds
from niels_gpt.train.pipeline import budget_shares, pipeline_configs, run_pipeline
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.sft import run_sft
from niels_gpt.train.signals import leaving_on_signals
from niels_gpt.train.start import TimeLimit

LONGEST = 525600  # minutes: a year


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.list_profiles:
        return exit_status(lambda: print("\n".join(profiles())), reader_gone=0)
    _check(args)
    limit = TimeLimit(args.minutes, args.until)
    return exit_status(
        lambda: _run(args, limit),
        go_on=None if args.print_config else how_to_go_on(args.resume, args.no_resume),
        reader_gone=0 if args.print_config else 1,
        expected=(ValueError, OSError, RuntimeError, MemoryError),
    )


def how_to_go_on(resume: str | None, no_resume: bool) -> str:
    """What to do after a stop: the same command, but for flags with which it would begin elsewhere."""
    flags = [flag for flag, given in (("--resume", resume is not None), ("--no-resume", no_resume)) if given]
    without = f", without {' and '.join(flags)}," if flags else ""
    return f"run the same command again{without} to go on"


def _run(args: argparse.Namespace, limit: TimeLimit) -> int:
    with leaving_on_signals():
        if args.plan is not None:
            run_planned(Path(args.plan), device=args.device, no_resume=args.no_resume)
            return 0
        config = Path(args.config) if args.config is not None else profile_path(args.profile)
        device = resolve_device(args.device)
        if args.print_config:
            print(f"using device: {device}", file=sys.stderr)
            spent = spent_seconds("sft" if args.phase == "sft" else "pretrain", args.resume, args.no_resume)
            print(json.dumps(resolved_configs(args.phase, config, limit, spent), indent=2, sort_keys=True))
            return 0
        try:
            with joined(device) as world:
                if world.is_main:
                    print(f"using device: {device}")
                run_phase(
                    args.phase,
                    config,
                    device=device,
                    resume=args.resume,
                    no_resume=args.no_resume,
                    limit=world.from_main(lambda: limit),
                    world=world,
                )
        except MainFailed:  # the main process says why
            return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    """Leave with a usage error unless there is either a plan or a phase with its settings."""
    if args.plan is None:
        if args.phase is None or (args.config is None and args.profile is None):
            _parser().error("--phase and one of --config or --profile are required, or --plan")
        return
    names = ("phase", "config", "profile", "resume", "minutes", "until", "print_config")
    if given := [name for name in names if getattr(args, name)]:
        _parser().error(f"a plan has its own phases, settings and time; leave out --{given[0]}")


def _parser() -> argparse.ArgumentParser:
    program = "python -m train.run" if __name__ == "__main__" else "niels-gpt train"
    parser = argparse.ArgumentParser(prog=program, description="Train a model: pretrain, sft or both.")
    parser.add_argument("--phase", choices=("pretrain", "sft", "pipeline"))
    parser.add_argument("--config", metavar="PATH", help="settings overrides (JSON); wins over --profile")
    parser.add_argument("--profile", metavar="NAME", help="a config of configs/ by its name")
    parser.add_argument("--plan", metavar="PATH", help="carry out a plan of niels-gpt plan: all phases, on its time")
    parser.add_argument("--list-profiles", action="store_true", help="show the names --profile knows")
    parser.add_argument("--device", help="cpu, mps or cuda; by default the best there is")
    parser.add_argument("--resume", metavar="PATH", help="go on from this checkpoint; wins over --no-resume")
    parser.add_argument("--no-resume", action="store_true", help="start afresh even if there is a checkpoint")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=minutes, metavar="X", help="end after this many minutes, on any machine")
    budget.add_argument("--until", type=moment, metavar="HH:MM", help="end at this time of day, or ISO date and time")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as JSON and stop")
    return parser


def minutes(text: str) -> float:
    """The value of --minutes; argparse.ArgumentTypeError if it cannot be one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of minutes above 0, {LONGEST} (a year) at most")
    return value


def moment(text: str) -> float:
    """The value of --until as `time.time()`: the next time the clock shows HH:MM, or an ISO date and time."""
    here = datetime.now()
    now = here.astimezone()
    try:
        today = datetime.combine(here, datetime.strptime(text, "%H:%M").time())
        at = today.astimezone()
        if at <= now:
            at = (today + timedelta(days=1)).astimezone()  # not 24 hours later: the clocks may change in between
    except ValueError:
        try:
            at = datetime.fromisoformat(text).astimezone()
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no time such as 07:00 or 2031-05-17T07:00") from None
    if at <= now:
        raise argparse.ArgumentTypeError(f"{text} is over: it is {now:%Y-%m-%dT%H:%M} now")
    if at - now > timedelta(minutes=LONGEST):
        raise argparse.ArgumentTypeError(f"{text} is more than a year away")
    return at.timestamp()


def profiles() -> list[str]:
    """Names of the configs that come with the project and of those in the current folder."""
    folders = {paths.CONFIG_DIR.resolve(), paths.PROJECT_ROOT / "configs"}
    return sorted({path.stem for folder in folders for path in folder.glob("*.json")})


def profile_path(name: str) -> Path:
    """The file of a profile; ValueError lists the known ones."""
    for folder in (paths.CONFIG_DIR, paths.PROJECT_ROOT / "configs"):
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    raise ValueError(f"unknown profile {name!r}; profiles are {', '.join(profiles())}")


def resolved_configs(phase: str, config: Path, limit: TimeLimit, spent: float) -> dict[str, Any]:
    """The settings `--print_config` shows, of a run that has used `spent` seconds before; nothing is written."""
    if phase != "pipeline":
        return resolve_settings(phase, config, flags=limit.flags(phase, spent)).settings.model_dump(mode="json")
    configs = dict(zip(PHASES, pipeline_configs(config), strict=True))
    limits = budget_shares(limit, configs["pretrain"], spent)
    flags = {"pretrain": limits["pretrain"].flags("pretrain", spent), "sft": limits["sft"].flags("sft")}
    return {
        name: resolve_settings(name, path, flags=flags[name]).settings.model_dump(mode="json")
        for name, path in configs.items()
    }


def run_phase(
    phase: str,
    config: Path,
    *,
    device: str,
    resume: str | None,
    no_resume: bool,
    limit: TimeLimit | None = None,
    world: World = ALONE,
) -> None:
    """Run one phase, or both; fine-tuning starts from what pretraining has left here."""
    options: dict[str, Any] = {
        "device": device,
        "resume_path": resume,
        "no_auto_resume": no_resume,
        "limit": limit,
        "world": world,
    }
    if phase == "sft":
        options["from_pretrained"] = True
    {"pretrain": run_pretrain, "sft": run_sft, "pipeline": run_pipeline}[phase](config, **options)


if __name__ == "__main__":
    sys.exit(main())
