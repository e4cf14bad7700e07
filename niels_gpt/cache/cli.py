"""Build, list and check token caches: `python -m niels_gpt.cache.cli COMMAND`.

`build SOURCE...` makes the caches of some sources, `build-all` those of the mixes, `build-sft-primer` that of any chat
JSONL file; `show` lists what is there with samples, `verify` reads every byte of it again. Caches that are up to date
are kept, and a build that was stopped goes on where it was.
Exit status: 0 done, 1 something failed (the rest is built all the same), 2 wrong usage, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from niels_gpt import files
from niels_gpt.cache.flags import (
    Roots,
    add_building,
    add_sources,
    chosen_budgets,
    chosen_roots,
    chosen_settings,
)
from niels_gpt.cache.format import TOKEN_DTYPE
from niels_gpt.cache.integrity import DEFAULT_CACHE_DIR
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.scale import Where, build_scaled
from niels_gpt.cache.sft import build_sft
from niels_gpt.cache.shared import Progress
from niels_gpt.cache.show import show, summary, verify
from niels_gpt.cache.watch import watching
from niels_gpt.command import exit_status
from niels_gpt.data.registry import canonical_name, get_source, is_optional
from niels_gpt.settings import PHASES, Settings, default_settings
from niels_gpt.tokenizer import SentencePieceTokenizer, Tokenizer, open_tokenizer


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.run is show:
        return exit_status(lambda: show(args), reader_gone=0)
    return exit_status(lambda: int(args.run(args)), stopped="stopped; run the same command again to go on from here")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="niels-gpt cache", description="Build, list and check token caches.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build the caches of some sources")
    build.add_argument("sources", nargs="+", metavar="SOURCE")
    build.add_argument("--phase", choices=(*PHASES, "both"), default="both", help="default: all that a source has")
    build.set_defaults(run=_build)

    everything = commands.add_parser("build-all", help="build the caches of every source in the mixes")
    everything.set_defaults(run=_build_all)

    primer = commands.add_parser("build-sft-primer", help="build the chat cache of a chat JSONL file")
    folder = default_settings().data.caches.sft_token_cache
    primer.add_argument(
        "--out-dir", help=f"the cache is OUT_DIR/primer (default: data.caches.sft_token_cache, {folder})"
    )
    primer.set_defaults(run=_build_sft_primer)

    for command in (build, everything, primer):
        add_building(command)
    for command in (build, everything):
        add_sources(command)

    for name, run, text in (("show", show, "list caches with samples"), ("verify", verify, "hash every cache again")):
        command = commands.add_parser(name, help=text)
        command.add_argument("sources", nargs="*", metavar="SOURCE", help="default: all")
        command.add_argument(
            "--cache-dir", help=f"holds pretrain/ and sft/ (default: data.caches, {DEFAULT_CACHE_DIR})"
        )
        command.add_argument("--config", help="JSON file of overrides")
        command.set_defaults(run=run)
    return parser


def _build(args: argparse.Namespace) -> int:
    settings = chosen_settings(args)
    tokenizer, roots = open_tokenizer(settings, args.tokenizer), chosen_roots(args, settings)
    jobs = []
    for name in map(canonical_name, dict.fromkeys(args.sources)):
        source = get_source(name)
        has = {"pretrain": source.documents is not None or source.stream is not None, "sft": source.chats is not None}
        jobs += [(phase, name) for phase in PHASES if args.phase == phase or (args.phase == "both" and has[phase])]
    failed = [(phase, name) for phase, name in jobs if not _build_one(args, settings, tokenizer, roots, phase, name)]
    if len(jobs) > 1 and failed:
        print(f"error: not built: {', '.join(f'{phase}/{name}' for phase, name in failed)}", file=sys.stderr)
    return 1 if failed else 0


def _build_all(args: argparse.Namespace) -> int:
    settings = chosen_settings(args)
    tokenizer, roots = open_tokenizer(settings, args.tokenizer), chosen_roots(args, settings)
    mixes = {"pretrain": settings.data.mix_pretrain, "sft": settings.data.mix_sft}
    jobs = [(phase, name) for phase, mix in mixes.items() for name in mix]
    if isinstance(tokenizer, SentencePieceTokenizer):
        _copy_tokenizer(tokenizer, roots.pretrain.parent / "tokenizer")
    print(f"building {', '.join(f'{phase}/{name}' for phase, name in jobs)} in {roots.pretrain} and {roots.sft}")
    failed = [job for job in jobs if not _build_one(args, settings, tokenizer, roots, *job)]
    missing = [
        str(path)
        for phase, name in jobs
        if not (path := roots.of(phase) / name / "meta.json").is_file() and not is_optional(name)
    ]
    if missing:
        raise FileNotFoundError(f"caches of the mixes are missing: {', '.join(missing)}")
    if failed:
        raise ValueError(f"not built anew: {', '.join(f'{phase}/{name}' for phase, name in failed)}; the old ones stay")
    return 0


def _build_one(
    args: argparse.Namespace, settings: Settings, tokenizer: Tokenizer, roots: Roots, phase: str, name: str
) -> bool:
    def text(progress: Progress) -> dict[str, Any] | None:
        budgets = chosen_budgets(args, name)
        if args.executor:
            where = Where(args.executor, args.tasks, args.partition, args.time_limit)
            return build_scaled(settings, tokenizer, name, root=roots.pretrain, where=where, **budgets)
        options = {"root": roots.pretrain, "workers": args.workers, "progress": progress}
        return build_pretrain(settings, tokenizer, name, **options, **budgets)

    def chats(progress: Progress) -> dict[str, Any]:
        return build_sft(settings, tokenizer, name, root=roots.sft, strict=not args.skip_bad, progress=progress)

    return _report(f"{phase}/{name}", is_optional(name), text if phase == "pretrain" else chats)


def _build_sft_primer(args: argparse.Namespace) -> int:
    settings = chosen_settings(args)
    tokenizer = open_tokenizer(settings, args.tokenizer)
    root = chosen_roots(args, settings).sft
    if args.out_dir is not None and root.name == "primer":
        root = root.parent

    def build(progress: Progress) -> dict[str, Any]:
        return build_sft(settings, tokenizer, "primer", root=root, strict=not args.skip_bad, progress=progress)

    return 0 if _report("sft/primer", False, build) else 1


def _report(name: str, optional: bool, build: Callable[[Progress], dict[str, Any] | None]) -> bool:
    """Run one build with a progress line; print how it went. A missing optional source is no failure."""
    started = time.monotonic()
    try:
        with watching(name) as progress:
            meta = build(progress)
    except FileNotFoundError as error:
        if optional:
            print(f"- {name} skipped: {error}")
            return True
        print(f"✗ {name} failed: {error}", file=sys.stderr)
        return False
    except (ValueError, OSError, RuntimeError) as error:
        print(f"✗ {name} failed: {files.explained(error)}", file=sys.stderr)
        return False
    if meta is None:
        print(f"- {name}: its tasks are queued")
        return True
    took = "up to date" if meta.get("reused") else f"{time.monotonic() - started:.1f} s"
    if kept := meta.get("reused_documents"):
        took = f"reused {kept:,} documents, tokenized {sum(meta['documents'].values()) - kept:,}, {took}"
    print(f"✓ {name}: {summary(meta)}, {took}")
    return True


def _copy_tokenizer(tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    """Put the tokenizer beside the caches that depend on it."""
    files.write_bytes(folder / "spm.model", tokenizer.model_bytes)
    if tokenizer.model_path is not None and (about := tokenizer.model_path.with_name("tokenizer_meta.json")).is_file():
        files.write_bytes(folder / "tokenizer_meta.json", about.read_bytes())
    meta = {
        "dataset_name": "tokenizer",
        "dataset_config": None,
        "split_rule": None,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "special_token_ids": tokenizer.special_token_ids(),
        "token_dtype": TOKEN_DTYPE,
    }
    files.write_json(folder / "meta.json", meta)


if __name__ == "__main__":
    sys.exit(main())
