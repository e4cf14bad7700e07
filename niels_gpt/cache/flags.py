"""What the flags of the cache programs mean: settings, folders and the tokenizer they ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from niels_gpt.settings import Settings, load_overrides, tokenizer_file, validate_overrides
from niels_gpt.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

PHASES = ("pretrain", "sft")


@dataclass(frozen=True)
class Roots:
    pretrain: Path
    sft: Path

    def of(self, phase: str) -> Path:
        return self.pretrain if phase == "pretrain" else self.sft


def chosen_settings(args: argparse.Namespace) -> Settings:
    overrides = load_overrides(args.config)
    validate_overrides(overrides)  # before it is added to
    given = {
        ("roam", "root_dir"): getattr(args, "roam_dir", None),
        ("text", "root_dir"): getattr(args, "text_dir", None),
        ("primer", "jsonl_path"): getattr(args, "primer_jsonl", None),
        ("primer", "seed"): (seed := getattr(args, "seed", None)),
        **{(source, "split_seed"): seed for source in ("roam", "text", "chitchat")},
    }
    for (source, key), value in given.items():
        if value is not None:
            overrides.setdefault("data", {}).setdefault(source, {})[key] = value
    return validate_overrides(overrides)


def chosen_roots(args: argparse.Namespace, settings: Settings) -> Roots:
    caches = settings.data.caches
    roots = Roots(Path(caches.pretrain_token_cache), Path(caches.sft_token_cache))
    if args.cache_dir is not None:
        roots = Roots(Path(args.cache_dir) / "pretrain", Path(args.cache_dir) / "sft")
    out_dir = getattr(args, "out_dir", None)
    return roots if out_dir is None else Roots(roots.pretrain, Path(out_dir))


def chosen_tokenizer(args: argparse.Namespace, settings: Settings) -> Tokenizer:
    chosen = settings.tokenizer
    if args.tokenizer is None and chosen.type == "byte":
        return ByteTokenizer()
    path = Path(args.tokenizer) if args.tokenizer else tokenizer_file(chosen) or Path(chosen.model_path)
    return load_tokenizer(path, chosen.expected_special_token_ids.model_dump())
