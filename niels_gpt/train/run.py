"""`python -m train.run`: pretraining, fine-tuning, or both in a row.

    python -m train.run --phase pretrain --config configs/pretrain.json [--device cpu|mps|cuda]
                        [--resume PATH | --no-resume] [--print_config]
    python -m train.run --phase pipeline --config configs/pipeline.json --no-resume

Exit code 0 when trained, 1 when it failed, 2 for wrong usage, 128+n when signal n stopped it (its state is saved).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from niels_gpt import files, paths
from niels_gpt.checkpoint import phase_paths
from niels_gpt.device import resolve_device
from niels_gpt.settings import resolve_settings
from niels_gpt.train.distributed import ALONE, World, joined
from niels_gpt.train.loop import Interrupted
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.sft import run_sft

PIPELINE_KEYS = {"pretrain_config_path", "sft_config_path"}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.list_profiles:
        print("\n".join(profiles()))
        return 0
    if args.phase is None or (args.config is None and args.profile is None):
        _parser().error("--phase and one of --config or --profile are required")
    try:
        config = Path(args.config) if args.config is not None else profile_path(args.profile)
        device = resolve_device(args.device)
        if args.print_config:
            print(f"using device: {device}", file=sys.stderr)
            print(json.dumps(resolved_configs(args.phase, config), indent=2, sort_keys=True))
            return 0
        with joined(device) as world:
            if world.is_main:
                print(f"using device: {device}")
            run_phase(args.phase, config, device=device, resume=args.resume, no_resume=args.no_resume, world=world)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        files.discard_output()
        print("the output was closed, so training stopped; the same command goes on", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {files.explained(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.run", description="Train a model: pretrain, sft or both.")
    parser.add_argument("--phase", choices=("pretrain", "sft", "pipeline"))
    parser.add_argument("--config", metavar="PATH", help="settings overrides (JSON); wins over --profile")
    parser.add_argument("--profile", metavar="NAME", help="a config of configs/ by its name")
    parser.add_argument("--list-profiles", action="store_true", help="show the names --profile knows")
    parser.add_argument("--device", help="cpu, mps or cuda; by default the best there is")
    parser.add_argument("--resume", metavar="PATH", help="go on from this checkpoint")
    parser.add_argument("--no-resume", action="store_true", help="start afresh even if there is a checkpoint")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as JSON and stop")
    return parser


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


def pipeline_configs(config: Path) -> tuple[Path, Path]:
    """The two config files a pipeline names, relative to the current folder or to the pipeline's own."""
    content = files.read_json(config)
    keys = set(content) - {"_why"} if isinstance(content, dict) else set()
    if keys != PIPELINE_KEYS:
        raise ValueError(f"{config} must hold exactly {' and '.join(sorted(PIPELINE_KEYS))}, it holds {sorted(keys)}")
    found = []
    for key in ("pretrain_config_path", "sft_config_path"):
        path = Path(content[key])
        beside = config.parent / path.name
        found.append(path if path.is_file() else beside)
    return found[0], found[1]


def resolved_configs(phase: str, config: Path) -> dict[str, Any]:
    """The settings `--print_config` shows; nothing is written."""
    if phase != "pipeline":
        return resolve_settings(phase, config).settings.model_dump(mode="json")
    pretrain, sft = pipeline_configs(config)
    return {
        name: resolve_settings(name, path).settings.model_dump(mode="json")
        for name, path in (("pretrain", pretrain), ("sft", sft))
    }


def run_phase(
    phase: str, config: Path, *, device: str, resume: str | None, no_resume: bool, world: World = ALONE
) -> None:
    """Run one phase, or pretraining and then fine-tuning from its best checkpoint."""
    if phase == "pretrain":
        run_pretrain(config, device=device, resume_path=resume, no_auto_resume=no_resume, world=world)
    elif phase == "sft":
        run_sft(config, device=device, resume_path=resume, no_auto_resume=no_resume, world=world)
    else:
        pretrain, sft = pipeline_configs(config)
        run_pretrain(pretrain, device=device, resume_path=resume, no_auto_resume=no_resume, world=world)
        init = world.from_main(pretrained_model)
        run_sft(sft, device=device, no_auto_resume=True, init_model_path=init, world=world)


def pretrained_model() -> Path:
    """The checkpoint fine-tuning starts from: pretraining's best, else its latest."""
    found = phase_paths("pretrain")
    for path in (found.best, found.latest):
        if path.is_file():
            return path
    raise RuntimeError(f"pretraining left no checkpoint in {found.step_dir}; run --phase pretrain first")


if __name__ == "__main__":
    sys.exit(main())
