"""Train a tokenizer: `niels-gpt tokenizer`, also `python scripts/train_tokenizer.py`.

    niels-gpt tokenizer --source chitchat --source primer            offline, from text that comes with the installation
    niels-gpt tokenizer --config configs/offline.json                from the mix of a config, to where it wants it
    python scripts/train_tokenizer.py --input_glob "notes/**/*.md" --include_wikitext --fineweb_bytes 20000000

Secrets in files of --input_glob are masked before they are learned, as in notes (`data.notes.secrets` of --config).

Writes spm.model, spm.vocab and tokenizer_meta.json. The same text, options and SentencePiece give the same bytes. Exit
status: 0 done, 1 failed (an older tokenizer stays as it was), 2 wrong usage, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from niels_gpt import files
from niels_gpt.command import exit_status
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import MODEL_TYPES, SentencePieceTokenizer, load_tokenizer, train_tokenizer
from niels_gpt.tokenizer.corpus import (
    SHIPPED_SOURCES,
    Corpus,
    add_hub_flags,
    file_corpus,
    hub_corpora,
    matching_files,
    mix_corpora,
    named_corpora,
    settings_of,
)

SEED = 42


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if not (args.config or args.input_glob or args.source or args.wikitext or args.fineweb_bytes):
        shipped = " ".join(f"--source {name}" for name in SHIPPED_SOURCES)
        parser.error(f"name some text; {shipped} takes what comes with the installation")
    return exit_status(lambda: _train(args), stopped="stopped; no tokenizer was written")


def _parser() -> argparse.ArgumentParser:
    script = Path(sys.argv[0])  # scripts/train_tokenizer.py is the published way to start it
    program = script.name if script.stem == "train_tokenizer" else "niels-gpt tokenizer"
    parser = argparse.ArgumentParser(prog=program, description="Train a lossless SentencePiece tokenizer.")
    text = parser.add_argument_group("text to train on")
    text.add_argument(
        "--input_glob",
        "--input-glob",
        action="append",
        default=[],
        metavar="GLOB",
        help="text files; secrets in them are masked",
    )
    text.add_argument("--source", action="append", default=[], metavar="NAME", help="a source, such as chitchat")
    text.add_argument("--config", metavar="PATH", help="settings; alone: train on their mix, to where they want it")
    add_hub_flags(parser, wikitext="--include_wikitext", wikitext_bytes="--wikitext_limit_bytes")
    parser.add_argument("--out_dir", "--out-dir", type=Path, help="default: the folder of tokenizer.model_path")
    parser.add_argument("--vocab_size", "--vocab-size", type=int, help="default: tokenizer.vocab_size")
    parser.add_argument("--model_type", "--model-type", choices=MODEL_TYPES, help="default: tokenizer.type")
    parser.add_argument("--seed", type=int, default=SEED, help="recorded only: nothing here is random (%(default)s)")
    return parser


def _train(args: argparse.Namespace) -> int:
    began = time.monotonic()
    settings = settings_of(args)
    wanted = settings.tokenizer
    if wanted.type == "byte" and args.model_type is None:
        raise ValueError(f"{args.config} is about bytes (tokenizer.type), which need no tokenizer file")
    model_path = Path(wanted.model_path)
    if args.out_dir is None and model_path.name != "spm.model":
        raise ValueError(f"tokenizer.model_path is {model_path}, but spm.model is written; say where with --out_dir")
    out_dir = args.out_dir or model_path.parent
    corpora = _corpora(args, settings)
    before = _hash(out_dir / "spm.model")
    meta: dict[str, Any] = {"input_globs": args.input_glob, "input_files": [], "dataset_sources": []}
    with _Progress() as progress:
        _interruptible(
            lambda: train_tokenizer(
                _texts(corpora, meta, progress),
                out_dir,
                vocab_size=args.vocab_size or wanted.vocab_size,
                model_type=args.model_type or wanted.type,
                seed=args.seed,
                sources=meta,
            )
        )
    tokenizer = load_tokenizer(out_dir / "spm.model")
    _say(tokenizer, corpora, out_dir, before, time.monotonic() - began)
    if tokenizer.vocab_size > settings.model.V:
        print(
            f"warning: {tokenizer.vocab_size} pieces are more than model.V={settings.model.V}: "
            f"set model.V to {tokenizer.vocab_size} or more to train with this tokenizer",
            file=sys.stderr,
        )
    return 0


def _corpora(args: argparse.Namespace, settings: Settings) -> list[Corpus]:
    """Files first, by name, then named sources, then samples of the hub; the mix of the config if none are chosen."""
    paths = matching_files(args.input_glob) if args.input_glob else []
    found = [file_corpus(path, settings.data.notes) for path in paths]
    found += named_corpora(args.source, settings) + hub_corpora(args, settings)
    return found or mix_corpora(settings)


def _texts(corpora: Sequence[Corpus], meta: dict[str, Any], progress: _Progress) -> Iterator[str]:
    """Every text, counted; what was read is put into the meta file at the end."""
    for corpus in corpora:
        progress.reading(corpus)  # to find the secrets of a large file takes a while
        for text in corpus:
            progress.reading(corpus)
            yield text
    meta["dataset_sources"] = [corpus.record() for corpus in corpora if corpus.about is not None]
    meta["input_files"] = [corpus.name for corpus in corpora if corpus.about is None and corpus.read["texts"]]
    if secrets := _secrets(corpora):
        meta["secrets"] = dict(sorted(secrets.items()))
        if not any(corpus.read["texts"] for corpus in corpora):
            raise ValueError("every file has secrets in it, and data.notes.secrets is skip; mask them instead")
    progress.training(sum(corpus.read["bytes"] for corpus in corpora))


def _secrets(corpora: Sequence[Corpus]) -> Counter[str]:
    """How many secrets the files had, by kind."""
    return sum((Counter(corpus.secrets) for corpus in corpora), Counter())


class _Progress:
    """One line on a terminal: what is read, then how long the training takes."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading text", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def reading(self, corpus: Corpus) -> None:
        shown = f"reading {corpus.name}: {corpus.read['bytes'] / 1e6:,.1f} MB"
        self._bar.update(self._task, description=shown.replace("[", "\\["))

    def training(self, n_bytes: int) -> None:
        self._bar.update(self._task, description=f"training on {n_bytes / 1e6:,.1f} MB (some seconds for every 10 MB)")


def _interruptible(work: Callable[[], object]) -> None:
    """Run `work` beside the main thread: SentencePiece itself never looks for Ctrl-C."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)
    if failed:
        raise failed[0]


def _hash(path: Path) -> str | None:
    return files.sha256_file(path) if path.is_file() else None


def _say(
    tokenizer: SentencePieceTokenizer, corpora: Sequence[Corpus], out_dir: Path, before: str | None, seconds: float
) -> None:
    read = {key: sum(corpus.read[key] for corpus in corpora) for key in ("texts", "bytes")}
    print(f"read {read['texts']:,} texts, {read['bytes']:,} bytes, from {len(corpora)} inputs")
    if secrets := _secrets(corpora):
        skipped = sum(bool(corpus.secrets) and not corpus.read["texts"] for corpus in corpora)
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(secrets.items()))
        what = f"left out {skipped:,} files with" if skipped else "masked"
        print(f"{what} {secrets.total():,} secrets ({kinds})")
    print(f"{tokenizer.vocab_size:,} pieces in {out_dir / 'spm.model'}, sha256 {tokenizer.sha256} ({seconds:.1f} s)")
    if before == tokenizer.sha256:
        print("the same tokenizer as before")
    elif before is not None:
        print(f"it replaced another ({before[:12]}): caches and models made with that one need it, build caches again")


if __name__ == "__main__":
    sys.exit(main())
