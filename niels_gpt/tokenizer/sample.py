"""Samples of the hub as plain text files: `tools/sample_fineweb.py` and `tools/sample_wikitext.py`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from niels_gpt import files
from niels_gpt.command import exit_status
from niels_gpt.tokenizer.corpus import add_fineweb_flags, byte_count, n_bytes, settings_of, source_corpus


@dataclass(frozen=True)
class Written:
    """What is in a sample file."""

    texts: int
    n_bytes: int
    sha256: str


def write_sample(
    texts: Iterable[str],
    out: Path,
    budget: int,
    *,
    between: str,
    after: str = "",
    trim: bool,
    progress: Progress | None,
) -> Written:
    """Write texts to `out` until `budget` bytes are reached; `out` appears whole or stays as it was.

    between, after: what goes between two texts, and after each. trim: cut the last text at the budget, between two
    characters; otherwise it is whole.
    """
    digest, n_texts, written = hashlib.sha256(), 0, 0
    task = progress.add_task(out.name, total=budget) if progress else None
    with files.atomic_write(out) as file:
        for text in texts:
            whole = ((between if n_texts else "") + text + after).encode("utf-8", "replace")
            content = whole[: budget - written].decode("utf-8", "ignore").encode("utf-8") if trim else whole
            file.write(content)
            digest.update(content)
            n_texts, written = n_texts + 1, written + len(content)
            if progress and task is not None:
                progress.update(task, completed=min(written, budget))
            if written >= budget or len(content) < len(whole):
                break
        if not written:
            raise ValueError(f"no text came for {out}; nothing was written")
    return Written(n_texts, written, digest.hexdigest())


def sample_fineweb(argv: Sequence[str] | None = None) -> int:
    """`tools/sample_fineweb.py`: whole rows, one a line block, LF line ends."""
    parser = argparse.ArgumentParser(prog="sample_fineweb", description="Write a sample of FineWeb-Edu to a file.")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--bytes", type=_budget, required=True, metavar="N", help="stop at the row that reaches this")
    add_fineweb_flags(parser, "")
    return _run(parser.parse_args(argv), "fineweb_edu", between="", after="\n", trim=False)


def sample_wikitext(argv: Sequence[str] | None = None) -> int:
    """`tools/sample_wikitext.py`: rows with a blank line between them, cut at the budget."""
    parser = argparse.ArgumentParser(prog="sample_wikitext", description="Write a sample of WikiText-103 to a file.")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--bytes", type=_budget, default=5_000_000, metavar="N", help="size of it (%(default)s)")
    parser.set_defaults(fineweb_dataset=None, fineweb_name=None, fineweb_split=None)
    return _run(parser.parse_args(argv), "wikitext", between="\n\n", after="", trim=True)


def _budget(text: str) -> int:
    if not (count := byte_count(text)):
        raise argparse.ArgumentTypeError("a sample needs at least 1 byte")
    return count


def _run(args: argparse.Namespace, source: str, *, between: str, after: str, trim: bool) -> int:
    def work() -> None:
        corpus = source_corpus(source, settings_of(args), budget=sys.maxsize)  # the file has the budget
        with _shown() as progress:
            made = write_sample(
                _cleaned(corpus), args.out, args.bytes, between=between, after=after, trim=trim, progress=progress
            )
        print(f"wrote {made.texts:,} texts, {made.n_bytes:,} bytes, to {args.out}")
        print(f"sha256 {made.sha256}")

    return exit_status(work, stopped="stopped; nothing was written")


def _cleaned(texts: Iterable[str]) -> Iterator[str]:
    """Texts without blank ends, so that what separates them is the separator alone; blank ones left out."""
    return (clean for text in texts if (clean := text.strip("\n")) and n_bytes(clean))


@contextmanager
def _shown() -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
