"""Text to train tokenizers on and to judge them by: files, named sources, and samples of the hub, within byte budgets.

Line ends become LF. Every text is checked for sentinel literals, which no builder accepts. Files to learn from may be
notes, so `data.notes.secrets` rules over secrets in them too: the pieces of a tokenizer are text that it has read. The
flags that choose text are the same for every program here, with `_` or `-` between their words.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from niels_gpt.data.notes.secrets import mask
from niels_gpt.data.registry import canonical_name, get_source
from niels_gpt.settings import NotesSettings, Settings, load_overrides, validate_overrides
from niels_gpt.special_tokens import assert_no_special_collision

SHIPPED_SOURCES = ("chitchat", "primer")  # come with the installation
MIX_BYTES = 50_000_000  # most of a mix that is read; beyond it, more text hardly changes a vocabulary


@dataclass(frozen=True)
class Corpus:
    """Texts under one name. `about` says what they are; `read` and `secrets` count what was read so far."""

    name: str
    texts: Callable[[], Iterator[str]]
    about: dict[str, Any] | None = None  # None for a file, which is listed by its name
    read: dict[str, int] = field(default_factory=lambda: {"texts": 0, "bytes": 0})
    secrets: dict[str, int] = field(default_factory=dict)  # in a file, by kind

    def __iter__(self) -> Iterator[str]:
        for i, text in enumerate(self.unchecked()):
            assert_no_special_collision(text, dataset=self.name, doc_index=i, field="text")
            yield text

    def unchecked(self) -> Iterator[str]:
        """The texts, also those with sentinel literals."""
        self.read.update(texts=0, bytes=0)
        for text in self.texts():
            clean = text.replace("\r\n", "\n")
            self.read["texts"] += 1
            self.read["bytes"] += n_bytes(clean)
            yield clean

    def record(self) -> dict[str, Any]:
        """What was read, for a meta file."""
        return {**(self.about or {"file": self.name}), **self.read}


def n_bytes(text: str) -> int:
    """Size in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def within(texts: Iterable[str], budget: int | None) -> Iterator[str]:
    """Texts until `budget` bytes of UTF-8 are reached; the last one is whole. None = all."""
    left = budget
    for text in texts:
        if left is not None and left <= 0:
            return
        yield text
        if left is not None:
            left -= n_bytes(text)
            if left <= 0:
                return


def matching_files(patterns: Sequence[str]) -> list[Path]:
    """Files that match any glob (`**` included), relative to the current folder, each once, sorted.

    A pattern without files is named in a warning. Raises FileNotFoundError if no pattern has any.
    """
    found = {
        pattern: [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        for pattern in patterns
    }
    by_place = {p.resolve(): p for p in sorted(map(shown, itertools.chain(*found.values())), reverse=True)}
    if not by_place:
        raise FileNotFoundError(f"no files match {', '.join(map(repr, patterns))} in {Path.cwd()}")
    for pattern, matches in found.items():
        if not matches:
            print(f"warning: no files match {pattern!r}", file=sys.stderr)
    return sorted(by_place.values())


def shown(path: Path) -> Path:
    """The path relative to the current folder, where it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path


def file_corpus(path: Path, notes: NotesSettings | None = None) -> Corpus:
    """A text file as one text. `notes`: what becomes of secrets in it; None where it is not learned from."""
    secrets: dict[str, int] = {}

    def texts() -> Iterator[str]:
        secrets.clear()
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 or leave it out") from None
        if notes is not None and notes.secrets != "keep":
            text, found = mask(text.replace("\r\n", "\n"), notes.phone_region)
            secrets.update(found)
        if not (secrets and notes is not None and notes.secrets == "skip"):
            yield text

    return Corpus(path.as_posix(), texts, secrets=secrets)


def source_corpus(name: str, settings: Settings, *, budget: int | None = None) -> Corpus:
    """The training text of a source of the registry; a stream needs a budget."""
    source = get_source(name)
    if source.documents is None and source.stream is None:
        raise ValueError(f"the source {source.name} has chats, not text")
    if source.documents is None and budget is None:
        raise ValueError(f"the source {source.name} has no end; say how many bytes to read of it")

    def texts() -> Iterator[str]:
        if source.documents is not None:
            documents = source.documents(settings, "train")
        else:
            documents = source.stream(settings) if source.stream is not None else iter(())
        return within((document.text for document in documents), budget)

    section = getattr(settings.data, source.name, None)
    known = {"dataset": "dataset_id", "config": "config", "name": "name", "split": "split"}
    about = {key: getattr(section, attr) for key, attr in known.items() if hasattr(section, attr)}
    return Corpus(source.name, texts, {"source": source.name, **about, "limit_bytes": budget})


def mix_corpora(settings: Settings, budget: int = MIX_BYTES) -> list[Corpus]:
    """Every source of `data.mix_pretrain`, each up to its share of the budget."""
    mix = settings.data.mix_pretrain
    return [source_corpus(name, settings, budget=int(budget * mix[name])) for name in sorted(mix)]


# Flags


def add_hub_flags(parser: argparse.ArgumentParser, *, wikitext: str, wikitext_bytes: str) -> None:
    """Flags that choose text of the hub; those of wikitext have other names in other programs."""
    parser.add_argument(*_spellings(wikitext), dest="wikitext", action="store_true", help="text of WikiText-103")
    parser.add_argument(
        *_spellings(wikitext_bytes),
        dest="wikitext_bytes",
        type=byte_count,
        metavar="N",
        help="bytes of it (default: all)",
    )
    parser.add_argument(
        *_spellings("--fineweb_bytes"),
        type=byte_count,
        default=0,
        metavar="N",
        help="bytes of FineWeb-Edu (default: none)",
    )
    add_fineweb_flags(parser, "fineweb_")


def add_fineweb_flags(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Which dataset of the hub to read; the defaults are those of data.fineweb_edu."""
    for flag, key in (("dataset", "dataset_id"), ("name", "name"), ("split", "split")):
        parser.add_argument(
            *_spellings(f"--{prefix}{flag}"),
            dest=f"fineweb_{flag}",
            metavar="NAME",
            help=f"default: data.fineweb_edu.{key}",
        )


def byte_count(text: str) -> int:
    """A flag's number of bytes: a whole number, not negative; `20_000_000` may be written so."""
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give a number of bytes")
    return count


def _spellings(flag: str) -> list[str]:
    return list(dict.fromkeys((flag, f"--{flag[2:].replace('_', '-')}")))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of `--config`, with the dataset that the flags name; FineWeb-Edu is read in order, not shuffled."""
    overrides = load_overrides(getattr(args, "config", None))
    validate_overrides(overrides)  # before it is added to
    chosen = {"dataset_id": args.fineweb_dataset, "name": args.fineweb_name, "split": args.fineweb_split}
    given: Mapping[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    overrides.setdefault("data", {}).setdefault("fineweb_edu", {}).update({**given, "shuffle": False})
    return validate_overrides(overrides)


def hub_corpora(args: argparse.Namespace, settings: Settings) -> list[Corpus]:
    """What the flags of `add_hub_flags` chose."""
    chosen = []
    if args.wikitext or args.wikitext_bytes is not None:
        chosen.append(source_corpus("wikitext", settings, budget=args.wikitext_bytes))
    if args.fineweb_bytes:
        chosen.append(source_corpus("fineweb_edu", settings, budget=args.fineweb_bytes))
    return chosen


def named_corpora(names: Sequence[str], settings: Settings) -> list[Corpus]:
    """Sources by name, each once; of endless ones the first `MIX_BYTES`."""
    wanted = dict.fromkeys(map(canonical_name, names))
    return [source_corpus(n, settings, budget=None if get_source(n).documents else MIX_BYTES) for n in wanted]
