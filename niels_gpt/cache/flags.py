"""The flags of the cache programs, and what they mean: the settings and folders they ask for.

Every default is that of the settings, so that the same command without flags and the programs that build caches
themselves make the same caches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niels_gpt.cache.integrity import DEFAULT_CACHE_DIR
from niels_gpt.cache.scale import EXECUTORS, Where
from niels_gpt.settings import DATA_SEEDS, Settings, default_settings, load_overrides, validate_overrides

BUDGETED = "fineweb_edu"  # the source with budget flags of its own

# flag -> the settings that it sets
_SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "roam_dir": (("roam", "root_dir"),),
    "text_dir": (("text", "root_dir"),),
    "primer_jsonl": (("primer", "jsonl_path"),),
    "seed": DATA_SEEDS,
    "skip_bad": (("jsonl", "skip_bad"),),
    "val_frac": (("caches", "val_frac"), ("primer", "val_frac")),
    "t_max": (("primer", "t_max"),),
    "shard_bytes": (("caches", "shard_bytes"),),
    "train_tokens": (("caches", "train_tokens"),),
    "val_tokens": (("caches", "val_tokens"),),
}


def add_building(command: argparse.ArgumentParser) -> None:
    """Flags of every command that builds."""
    data = default_settings().data
    command.add_argument("--config", help="JSON file of overrides: mixes, folders, tokenizer")
    command.add_argument("--tokenizer", help="SentencePiece model (default: tokenizer.model_path)")
    command.add_argument("--primer-jsonl", help=f"chat JSONL file (default: {data.primer.jsonl_path})")
    command.add_argument("--seed", type=int, help=f"seed of every split and shuffle (default: {data.caches.seed})")
    command.add_argument(
        "--val-frac", type=float, help=f"share of the chats kept for validation (default: {data.primer.val_frac})"
    )
    command.add_argument(
        "--t-max", type=int, help=f"longest primer conversation, in tokens (default: {data.primer.t_max})"
    )
    command.add_argument("--skip-bad", action="store_true", help="drop and count bad chats instead of stopping")


def add_sources(command: argparse.ArgumentParser) -> None:
    """Flags of the commands that build sources by name."""
    data = default_settings().data
    command.add_argument("--cache-dir", help=f"holds pretrain/ and sft/ (default: data.caches, {DEFAULT_CACHE_DIR})")
    command.add_argument("--out-dir", help="folder of the chat caches (default: its sft/)")
    command.add_argument("--shard-bytes", type=int, help=f"size of a shard file (default: {data.caches.shard_bytes})")
    command.add_argument("--roam-dir", help=f"folder of your notes (default: {data.roam.root_dir})")
    command.add_argument("--text-dir", help=f"folder of your text files (default: {data.text.root_dir})")
    for split, default in (("train", data.caches.train_tokens), ("val", data.caches.val_tokens)):
        command.add_argument(
            f"--{split}-tokens", type=int, help=f"{split} tokens of sources that are one stream (default: {default})"
        )
        command.add_argument(f"--fineweb-{split}-tokens", type=int, help=f"the same for {BUDGETED} alone")
    command.add_argument("--executor", choices=EXECUTORS, help="build text with datatrove, in tasks")
    command.add_argument(
        "--tasks", type=_count, default=1, metavar="N", help="tasks of the executor (default: %(default)s)"
    )
    command.add_argument(
        "--partition", default=Where.partition, help="Slurm partition of the tasks (default: %(default)s)"
    )
    command.add_argument(
        "--time-limit", default=Where.time_limit, help="Slurm time limit of a task (default: %(default)s)"
    )
    command.add_argument("--workers", type=_count, metavar="N", help="processes that tokenize (default: one a core)")


def _count(text: str) -> int:
    if not text.isdecimal() or not (count := int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return count


@dataclass(frozen=True)
class Roots:
    """Folders of the token caches of both phases."""

    pretrain: Path
    sft: Path

    def of(self, phase: str) -> Path:
        """The folder of one phase's caches."""
        return self.pretrain if phase == "pretrain" else self.sft


def chosen_settings(args: argparse.Namespace) -> Settings:
    """`--config` with what the other flags set; errors as for `load_overrides` and `validate_overrides`."""
    overrides = load_overrides(args.config)
    validate_overrides(overrides)  # before it is added to
    for flag, places in _SETS.items():
        value = getattr(args, flag, None)
        for section, key in places if value is not None and value is not False else ():
            overrides.setdefault("data", {}).setdefault(section, {})[key] = value
    return validate_overrides(overrides)


def chosen_budgets(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """The budgets in tokens that were given for this source alone."""
    if source != BUDGETED:
        return {}
    return {f"{split}_tokens": getattr(args, f"fineweb_{split}_tokens") for split in ("train", "val")}


def chosen_roots(args: argparse.Namespace, settings: Settings) -> Roots:
    """Where the caches are: `--cache-dir` and `--out-dir`, of those that there are, else the settings."""
    caches = settings.data.caches
    roots = Roots(Path(caches.pretrain_token_cache), Path(caches.sft_token_cache))
    cache_dir, out_dir = getattr(args, "cache_dir", None), getattr(args, "out_dir", None)
    if cache_dir is not None:
        roots = Roots(Path(cache_dir) / "pretrain", Path(cache_dir) / "sft")
    return roots if out_dir is None else Roots(roots.pretrain, Path(out_dir))
