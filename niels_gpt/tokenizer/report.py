"""How well tokenizers fit text: `python tools/tokenizer_report.py --tokenizer spm.model --text-file notes.txt`.

Per input and over all of them: tokens, characters, bytes and their ratios, tokens per word (fertility), the shares of
unknown and byte-fallback tokens, texts that do not come back as they were, sentinels, the most frequent pieces. Several
`--tokenizer` are put side by side. Exit status: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from niels_gpt.command import exit_status
from niels_gpt.console import wide_console
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from niels_gpt.tokenizer.corpus import (
    Corpus,
    add_hub_flags,
    file_corpus,
    hub_corpora,
    n_bytes,
    named_corpora,
    settings_of,
)

BATCH = 256  # texts encoded at once
SHOWN_PIECES = 20
COLUMNS = ("tokens", "tokens/byte", "bytes/token", "tokens/char", "tokens/word", "unk%", "byte%", "lossy")


class Measure:
    """Counts of one tokenizer over one text source; sums of them are counts as well."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # occurrences of every id
        self.text = dict.fromkeys(("texts", "chars", "bytes", "words", "lossy_texts"), 0)
        self.literals = dict.fromkeys(SPECIAL_TOKENS, 0)
        self.seconds = 0.0

    def add(self, texts: Sequence[str]) -> None:
        began = time.perf_counter()
        encoded = self.tokenizer.encode_arrays(texts)
        self.seconds += time.perf_counter() - began
        for text, ids in zip(texts, encoded, strict=True):
            self.ids += np.bincount(ids, minlength=len(self.ids))
            counts = (1, len(text), n_bytes(text), len(text.split()), self.tokenizer.decode(ids) != text)
            for key, count in zip(self.text, counts, strict=True):
                self.text[key] += int(count)
            for name, literal in SPECIAL_TOKENS.items():
                self.literals[name] += text.count(literal)

    def __add__(self, other: Measure) -> Measure:
        total = Measure(self.tokenizer)
        total.ids = self.ids + other.ids
        total.text = {key: self.text[key] + other.text[key] for key in self.text}
        total.literals = {key: self.literals[key] + other.literals[key] for key in self.literals}
        total.seconds = self.seconds + other.seconds
        return total

    def report(self) -> dict[str, Any]:
        """Everything measured, as JSON values; ratios of nothing are null."""
        tokens, text = int(self.ids.sum()), self.text
        unknown, fallback = (int(self.ids[kind].sum()) for kind in _kinds(self.tokenizer))
        return {
            **text,
            "tokens": tokens,
            "tokens_per_byte": _ratio(tokens, text["bytes"]),
            "bytes_per_token": _ratio(text["bytes"], tokens),
            "tokens_per_char": _ratio(tokens, text["chars"]),
            "tokens_per_word": _ratio(tokens, text["words"]),
            "unknown_tokens": unknown,
            "unknown_share": _ratio(unknown, tokens),
            "byte_fallback_tokens": fallback,
            "byte_fallback_share": _ratio(fallback, tokens),
            "pieces_used": int((self.ids > 0).sum()),
            "sentinel_tokens": {n: int(self.ids[i]) for n, i in self.tokenizer.special_token_ids().items()},
            "sentinel_literals": self.literals,
            "top": [
                {"id": int(i), "piece": _piece(self.tokenizer, int(i)), "count": int(self.ids[i])}
                for i in np.argsort(-self.ids, kind="stable")[:SHOWN_PIECES]
                if self.ids[i]
            ],
        }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _kinds(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the unknown piece, and of the pieces that stand for one byte because no other fits."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return [], []
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    return [pieces.index("<unk>")] if "<unk>" in pieces else [], [i for i in range(len(pieces)) if tokenizer.is_byte(i)]


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.piece(token_id)
    return tokenizer.decode([token_id])


def measure(tokenizer: Tokenizer, corpora: Sequence[Corpus], progress: Progress | None = None) -> dict[str, Measure]:
    """Name of the input -> its measure, and `combined`."""
    task = progress.add_task("", total=None) if progress else None
    found: dict[str, Measure] = {}
    for corpus in corpora:
        one = Measure(tokenizer)
        texts = corpus.unchecked()
        while batch := list(itertools.islice(texts, BATCH)):
            one.add(batch)
            if progress and task is not None:
                shown = f"{corpus.name}: {corpus.read['bytes'] / 1e6:,.1f} MB"
                progress.update(task, description=shown.replace("[", "\\["))
        found[corpus.name] = one
    found["combined"] = sum(found.values(), Measure(tokenizer))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_status(lambda: _report(args))


def _report(args: argparse.Namespace) -> None:
    tokenizers = {name: _open(name) for name in dict.fromkeys(args.tokenizer)}
    settings = settings_of(args)
    paths = [Path(name) for name in dict.fromkeys(args.text_file + args.fineweb_file)]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"there is no text file {', '.join(absent)}")
    corpora = [file_corpus(path) for path in paths]
    corpora += named_corpora(args.source, settings) + hub_corpora(args, settings)
    if not corpora:
        raise ValueError("name some text: --text-file FILE, --source NAME, --wikitext or --fineweb-bytes N")
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        measured = {name: measure(tokenizer, corpora, progress) for name, tokenizer in tokenizers.items()}
    if args.json:
        print(json.dumps({name: _record(tokenizers[name], found) for name, found in measured.items()}, indent=2))
    else:
        _print(tokenizers, measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenizer_report", description="How well tokenizers fit text.")
    parser.add_argument(
        "--tokenizer",
        action="append",
        required=True,
        metavar="PATH",
        help="a .model file, or the word byte; repeatable",
    )
    text = parser.add_argument_group("text")
    text.add_argument("--text-file", "--text_file", action="append", default=[], metavar="FILE", help="repeatable")
    text.add_argument("--source", action="append", default=[], metavar="NAME", help="a source, such as chitchat")
    text.add_argument("--fineweb-file", "--fineweb_file", action="append", default=[], help="a sample made earlier")
    add_hub_flags(parser, wikitext="--wikitext", wikitext_bytes="--wikitext_bytes")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser


def _open(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else load_tokenizer(name)


# Showing


def _record(tokenizer: Tokenizer, measured: dict[str, Measure]) -> dict[str, Any]:
    return {
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **{name: one.report() for name, one in measured.items()},
    }


def _print(tokenizers: dict[str, Tokenizer], measured: dict[str, dict[str, Measure]]) -> None:
    for name, tokenizer in tokenizers.items():
        print(f"{name}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")
        reports = {source: one.report() for source, one in measured[name].items()}
        for source, found in reports.items():
            print(_line(source, found))
        total = reports["combined"]
        ids, literals = total["sentinel_tokens"], total["sentinel_literals"]
        print("specials: " + ", ".join(f"{key}={ids.get(key, 0)} (in text: {n})" for key, n in literals.items()))
        print(f"pieces used: {total['pieces_used']:,} of {tokenizer.vocab_size:,}")
        print(f"top {SHOWN_PIECES} ids:")
        for entry in total["top"]:
            share = _share(entry["count"] / total["tokens"])
            print(f"  {entry['id']:>6}  {entry['count']:>10,}  {share}  {entry['piece']!a}")
        rate = total["bytes"] / 1e6 / max(measured[name]["combined"].seconds, 1e-9)
        print(f"encoded at {rate:.1f} MB/s\n")
    if len(tokenizers) > 1:
        _compare(tokenizers, measured)


def _line(source: str, found: dict[str, Any]) -> str:
    return (
        f"[{source}] tokens={found['tokens']} chars={found['chars']} tokens/char={_shown(found['tokens_per_char'])} "
        f"unk%={_share(found['unknown_share'])} bytes={found['bytes']} tokens/byte={_shown(found['tokens_per_byte'])} "
        f"bytes/token={_shown(found['bytes_per_token'])} tokens/word={_shown(found['tokens_per_word'])} "
        f"byte%={_share(found['byte_fallback_share'])} lossy={found['lossy_texts']}/{found['texts']}"
    )


def _compare(tokenizers: dict[str, Tokenizer], measured: dict[str, dict[str, Measure]]) -> None:
    """A row per input and tokenizer."""
    table = Table()
    for column in ("input", "tokenizer"):
        table.add_column(column, overflow="fold")
    table.add_column("pieces", justify="right")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for source in next(iter(measured.values())):
        for name, tokenizer in tokenizers.items():
            table.add_row(source, name, f"{tokenizer.vocab_size:,}", *_cells(measured[name][source].report()))
        table.add_section()
    wide_console().print(table, markup=False)


def _cells(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['tokens']:,}"
    for key in ("tokens_per_byte", "bytes_per_token", "tokens_per_char", "tokens_per_word"):
        yield _shown(found[key])
    for key in ("unknown_share", "byte_fallback_share"):
        yield _share(found[key])
    yield f"{found['lossy_texts']}/{found['texts']}"


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
