"""Look for sentinel literals in files, before a builder refuses them: `python tools/scan_special_collisions.py`.

Every file below the roots is searched as bytes, so that binary ones and any size do no harm; UTF-8 and UTF-16 are
known, compressed files are not looked into. Files of a tokenizer, which have to name its sentinels, are passed over.
One line per colliding file, with its first literal. Exit status: 0 none found, 1 found some or could not read a file,
2 wrong usage.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from niels_gpt.special_tokens import SPECIAL_TOKENS, find_special_collision

ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
TOKENIZER_FILES = frozenset({"spm.model", "spm.vocab", "tokenizer_meta.json"})
SNIPPET_BYTES = 400
_LITERAL = re.compile(b"|".join(re.escape(s.encode(e)) for e in ENCODINGS for s in SPECIAL_TOKENS.values()))


class Found(NamedTuple):
    """The first sentinel literal of a file; offsets are from the start of the file."""

    path: Path
    token: str
    byte_offset: int
    char_offset: int
    snippet: str

    def __str__(self) -> str:
        return (
            f"{self.path}: token={self.token} byte_offset={self.byte_offset} char_offset={self.char_offset} "
            f"snippet={self.snippet!r}"
        )


def scan_file(path: Path) -> Found | None:
    """The first sentinel literal of a file; None if it has none."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            first = _LITERAL.search(content)
            if first is None:
                return None
            start = first.start()
            encoding = _encoding(first[0])
            if start % 2 and encoding == "utf-16-be" and _LITERAL.match(content, start + 1):
                start, encoding = start + 1, "utf-16-le"  # the zero byte before belongs to the character before
            text = content[start : start + SNIPPET_BYTES].decode(encoding, "replace")
            before = content[:start].decode(encoding, "replace").removeprefix("\ufeff")
    collision = find_special_collision(text)
    assert collision is not None
    return Found(path, collision["token"], start, len(before), collision["snippet"])


def _encoding(literal: bytes) -> str:
    return next(e for e in ENCODINGS if literal in [token.encode(e) for token in SPECIAL_TOKENS.values()])


def files_below(roots: Sequence[Path]) -> Iterator[Path]:
    """Every regular file of the roots once, in order, but for tokenizers; links to folders are not followed."""
    seen: set[Path] = set()
    for root in roots:
        below = (
            [root] if root.is_file() else (Path(d) / n for d, _, names in sorted(os.walk(root)) for n in sorted(names))
        )
        for path in below:
            is_text = path.name not in TOKENIZER_FILES or path in roots
            if is_text and path.is_file() and (place := path.resolve()) not in seen:
                seen.add(place)
                yield path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scan_special_collisions", description="Find sentinel literals in files that would be trained on."
    )
    parser.add_argument(
        "--roots", nargs="+", type=Path, default=[Path("data")], help="folders or files (default: data)"
    )
    args = parser.parse_args(argv)
    if absent := [str(root) for root in args.roots if not root.exists()]:
        parser.error(f"there is no {', '.join(absent)}")
    collisions, unreadable, scanned = 0, 0, 0
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} files"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for path in progress.track(files_below(args.roots)):
            scanned += 1
            try:
                found = scan_file(path)
            except OSError as error:
                unreadable += 1
                print(f"error: {path} cannot be read: {error.strerror}", file=sys.stderr)
                continue
            if found is not None:
                collisions += 1
                print(found)
    if not collisions and not unreadable:
        print("no special token collisions detected.")
    print(f"{scanned:,} files scanned", file=sys.stderr)
    return 1 if collisions or unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
