"""`niels-gpt notes`: what would be learned from a folder of your notes, before anything is; then its token cache.

    niels-gpt notes --dir ~/notes --dry-run      the report and two samples; nothing is written
    niels-gpt notes --dir ~/notes                the same, and then the cache that training reads

Exit status: 0 done, 1 the folder, the settings or the tokenizer are not usable, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.command import exit_status
from niels_gpt.console import OutputConsole
from niels_gpt.data import roam, text
from niels_gpt.data.notes.report import BYTES_PER_TOKEN, make_report, remarks
from niels_gpt.data.notes.source import open_notes
from niels_gpt.data.notes.vault import Vault
from niels_gpt.settings import Settings, load_overrides, validate_overrides
from niels_gpt.tokenizer import Tokenizer, open_tokenizer

SAMPLES = 2
SAMPLE_CHARACTERS = 600
NAMES_SHOWN = 8  # of every reason; --json has all
_SPLITS = {"roam": roam.split_vault, "text": text.split_vault}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args), stopped="stopped; an unfinished cache was removed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="niels-gpt notes",
        description="Look at your notes as a model would see them, then build their token cache.",
    )
    parser.add_argument("--dir", help="folder of your notes (default: that of the source in the settings)")
    parser.add_argument(
        "--source",
        choices=tuple(_SPLITS),
        default="roam",
        help="roam reads Markdown vaults (default); text also .txt, .html and .jsonl",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the report and two samples, write nothing")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON and nothing else")
    parser.add_argument("--config", help="JSON file of overrides")
    parser.add_argument("--tokenizer", help="SentencePiece model (default: tokenizer.model_path)")
    parser.add_argument("--cache-dir", help="the cache is written to CACHE_DIR/pretrain/SOURCE")
    return parser


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    tokenizer = _tokenizer(args, settings)
    with _progress("notes") as say:
        vault = open_notes(settings, args.source, say)
    train, val = _SPLITS[args.source](vault, settings)
    report = make_report(vault, train, val, _bytes_per_token(vault, tokenizer))
    if not args.json:
        show_report(OutputConsole(), report, args.source)
        _show_samples(vault, train)
    if not args.dry_run:
        report["cache"] = _build(args, settings, tokenizer)
    if args.json:
        print(json.dumps(report, indent=2))
    elif args.dry_run:
        print(f"\nnothing was written; build the cache with: {_next_command(args)}")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    overrides = load_overrides(args.config)
    validate_overrides(overrides)  # before it is added to
    if args.dir is not None:
        overrides.setdefault("data", {}).setdefault(args.source, {})["root_dir"] = args.dir
    return validate_overrides(overrides)


def _tokenizer(args: argparse.Namespace, settings: Settings) -> Tokenizer | None:
    """The one that was named or that of the settings; None where a dry run, which only estimates with it, lacks it."""
    try:
        return open_tokenizer(settings, args.tokenizer)
    except FileNotFoundError:
        if args.dry_run and args.tokenizer is None:
            return None
        raise


def _bytes_per_token(vault: Vault, tokenizer: Tokenizer | None) -> float:
    """Measured on the first 100 kB of the notes, or a usual figure."""
    if tokenizer is None:
        return BYTES_PER_TOKEN
    size = tokens = 0
    for number in vault.kept:
        sample = vault.text(number)[: 100_000 - size]
        size, tokens = size + len(sample.encode()), tokens + len(tokenizer.encode(sample))
        if size >= 100_000:
            break
    return size / max(tokens, 1)


def _build(args: argparse.Namespace, settings: Settings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    assert tokenizer is not None, "it is loaded, or missing is an error, unless this is a dry run"
    root = Path(args.cache_dir) / "pretrain" if args.cache_dir else Path(settings.data.caches.pretrain_token_cache)
    with _progress("tokenizing"):
        meta = build_pretrain(settings, tokenizer, args.source, root=root)
    tokens = {split: meta[f"{split}_tokens"] for split in ("train", "val")}
    if not args.json:
        done = "is up to date" if meta.get("reused") else "is built"
        print(f"\nthe cache {root / args.source} {done}: {tokens['train']:,} + {tokens['val']:,} tokens (train + val)")
    return {"folder": str(root / args.source), "tokens": tokens, "reused": bool(meta.get("reused"))}


def _next_command(args: argparse.Namespace) -> str:
    names = ("source", "dir", "config", "tokenizer", "cache_dir")
    given = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in names]
    return shlex.join(["niels-gpt", "notes", *(part for flag, value in given if value for part in (flag, value))])


# Showing


def show_report(console: Console, report: dict[str, Any], source: str) -> None:
    """Print the report for a person; long lists of names are cut."""

    def say(line: str) -> None:
        console.print(line, markup=False)

    files = ", ".join(f"{n:,} {kind}" for kind, n in report["files"].items())
    say(f"{report['folder']}: {files}")
    for split in ("kept", "train", "val"):
        part = report["kept"] if split == "kept" else report["split"][split]
        size = f"{part['bytes']:,} bytes, about {part['estimated_tokens']:,} tokens"
        say(f"  {split:<6} {part['documents']:>7,} documents, {size}")
    if report["sharing_a_passage"]:
        say(f"  {report['sharing_a_passage']:,} documents share passages; those are kept on one side of the split")
    reasons = {f"dropped, {reason}": found for reason, found in report["dropped"].items()}
    for one in report["skipped"]:
        reasons.setdefault(f"not opened, {one['reason']}", []).append(one)
    for reason, found in reasons.items():
        say(f"{reason}: {len(found):,}")
        _say_names(say, [f"{one['name']} {one['detail']}".strip() for one in found])
    if report["decoded"]:
        say(f"decoded: {len(report['decoded']):,}")
        _say_names(say, [f"{name} from {encoding}" for name, encoding in report["decoded"].items()])
    if report["secrets"]:
        rule = {"mask": "masked", "skip": "their files skipped", "keep": "kept"}[report["secrets_rule"]]
        say(f"secrets, {rule}: " + ", ".join(f"{n:,} {kind}" for kind, n in report["secrets"].items()))
        by_file = report["secrets_by_file"].items()
        _say_names(say, [f"{name}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}" for name, kinds in by_file])
    for remark in remarks(report, source):
        say(f"note: {remark}")


def _say_names(say: Callable[[str], None], names: list[str]) -> None:
    for name in names[:NAMES_SHOWN]:
        say(f"  {name}")
    if len(names) > NAMES_SHOWN:
        say(f"  and {len(names) - NAMES_SHOWN:,} more (--json names all)")


def _show_samples(vault: Vault, train: list[int]) -> None:
    """The beginnings of two documents as a model will see them: those in which most was masked, else the longest."""
    ranked = sorted(train, key=lambda i: (-sum(vault.notes[i].secrets.values()), -vault.notes[i].size, i))
    for number in ranked[:SAMPLES]:
        sample = vault.text(number)
        more = "\n…" if len(sample) > SAMPLE_CHARACTERS else ""
        print(f"\n--- {vault.notes[number].name}, cleaned\n{sample[:SAMPLE_CHARACTERS]}{more}")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr while the block runs, where stderr is a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
