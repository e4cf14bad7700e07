"""What is in the token caches, and whether it is still what was written: the commands `show` and `verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt.cache.flags import PHASES, chosen_roots, chosen_settings
from niels_gpt.cache.format import SPLITS
from niels_gpt.cache.integrity import open_folder
from niels_gpt.data.registry import canonical_name


def _found(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(phase/source, folder) of every cache, or of the named ones."""
    settings = chosen_settings(args)
    roots = chosen_roots(args, settings)
    wanted = {canonical_name(name) for name in args.sources}
    found = 0
    for phase in PHASES:
        for meta in sorted(roots.of(phase).glob("*/meta.json")):
            if not meta.parent.name.startswith(".") and (not wanted or meta.parent.name in wanted):
                found += 1
                yield f"{phase}/{meta.parent.name}", meta.parent
    if not found:
        raise FileNotFoundError(f"no caches in {roots.pretrain} or {roots.sft}; build some with the command build")


def show(args: argparse.Namespace) -> int:
    bad = 0
    for name, folder in _found(args):
        try:
            _, meta, _ = open_folder(folder.parent, folder.name)
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            print(f"✗ {name}: {error}", file=sys.stderr)
        else:
            print(f"✓ {name}: {summary(meta)}, tokenizer {str(meta.get('tokenizer_sha256'))[:12]}")
    return 1 if bad else 0


def verify(args: argparse.Namespace) -> int:
    bad = 0
    for name, folder in _found(args):
        try:
            _, meta, _ = open_folder(folder.parent, folder.name, verify=True)
        except (ValueError, FileNotFoundError) as error:
            bad += 1
            print(f"✗ {name}: {error}", file=sys.stderr)
            continue
        listed = meta.get("files")
        print(f"✓ {name}: {len(listed)} files are as written" if listed else f"- {name}: it records no hashes to check")
    return 1 if bad else 0


def summary(meta: dict[str, Any]) -> str:
    """Documents and tokens of train and val, and what was dropped."""
    tokens = {split: meta.get(f"{split}_tokens", 0) for split in SPLITS}
    if "splits" in meta:
        tokens = {split: meta["splits"][split]["num_tokens"] for split in SPLITS}
    counts = {"documents": meta.get("documents"), "tokens": tokens}
    parts = [f"{n['train']:,} + {n['val']:,} {what}" for what, n in counts.items() if n]
    if meta.get("dropped"):
        parts.append("dropped " + ", ".join(f"{count} {reason}" for reason, count in meta["dropped"].items()))
    return ", ".join(parts) + " (train + val)"
