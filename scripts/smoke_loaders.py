"""Try every source of the Hugging Face hub: two samples each, with the real loaders. Needs a connection.

    python -m scripts.smoke_loaders

Exit status: 0 all of them passed, 1 at least one did not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from a bare checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from niels_gpt.data.registry import get_source
from niels_gpt.settings import Settings, load_overrides, validate_overrides

NAMES = ("fineweb_edu", "wikitext", "dolly15k", "oasst1", "gutenberg")
SAMPLES = 2
SHOWN = 160
SMALL_BUFFER = 100  # rows: two samples need no large one


@dataclass(frozen=True)
class Result:
    """How one source did."""

    name: str
    passed: bool
    detail: str
    seconds: float


RESULTS: list[Result] = []


def main(argv: list[str] | None = None) -> int:
    """Try the sources, print what they gave; 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m scripts.smoke_loaders", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", help="JSON file of overrides, for other data sets or revisions")
    args = parser.parse_args(argv)
    try:
        overrides = load_overrides(args.config)
        overrides.setdefault("reproducibility", {}).setdefault("dataset_shuffle_buffer_size", SMALL_BUFFER)
        settings = validate_overrides(overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RESULTS.clear()
    for name in NAMES:
        print(f"{name} ...", flush=True)
        RESULTS.append(_try(name, settings))
        print(f"  {RESULTS[-1].detail}")
    print()
    for result in RESULTS:
        print(f"{'PASS' if result.passed else 'FAIL'} {result.name} ({result.seconds:.1f} s)")
    return 0 if all(result.passed for result in RESULTS) else 1


def _try(name: str, settings: Settings) -> Result:
    started = time.monotonic()
    try:
        texts = list(itertools.islice(_texts(name, settings), SAMPLES))
        passed = len(texts) == SAMPLES and all(text.strip() for text in texts)
        shown = "\n  ".join(ascii(text[:SHOWN]) for text in texts)
        detail = shown if passed else f"{len(texts)} samples instead of {SAMPLES}, or blank ones: {shown}"
    except (ValueError, OSError) as error:
        passed, detail = False, str(error)
    return Result(name, passed, detail, time.monotonic() - started)


def _texts(name: str, settings: Settings) -> Iterator[str]:
    source = get_source(name)
    if source.stream is not None:
        yield from (document.text for document in source.stream(settings))
    elif source.documents is not None:
        yield from (document.text for document in source.documents(settings, "train"))
    elif source.chats is not None:
        for chat in source.chats(settings, "all"):
            yield "\n".join(f"{message.role}: {message.content}" for message in chat.messages)


if __name__ == "__main__":
    sys.exit(main())
