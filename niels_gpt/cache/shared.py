"""What building and opening have in common for pretraining and chat caches: when a cache is up to date, and mixes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from niels_gpt.cache.folder import sweep_folder
from niels_gpt.cache.integrity import open_folder
from niels_gpt.data.registry import is_optional
from niels_gpt.files import sha256_bytes
from niels_gpt.tokenizer import Tokenizer

Item = TypeVar("Item")

BUILD_VERSION = 2  # raise it when the same source must give other bytes than before


@dataclass(frozen=True)
class Done:
    """How far a build has come; what is not known is None or 0."""

    what: str  # the split, or the source
    documents: int
    n_bytes: int = 0
    n_tokens: int = 0
    of_documents: int | None = None
    of_tokens: int | None = None


Progress = Callable[[Done], None]


def fingerprint(description: Mapping[str, Any], **options: Any) -> str:
    """Hash of everything but the tokenizer that decides a cache's bytes."""
    content = {"version": BUILD_VERSION, "source": description, **options}
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


def up_to_date(folder: Path, wanted: str, tokenizer: Tokenizer, *, resume: bool = False) -> dict[str, Any] | None:
    """meta.json with `reused` added, if the cache at `folder` is whole and is what a build would make; else None.

    What a killed build left is cleaned up, except, to `resume`, one that can be gone on with. Only for the process that
    holds the lock of the folder.
    """
    sweep_folder(folder, resume=resume)
    try:
        _, meta, _ = open_folder(folder.parent, folder.name)
    except (FileNotFoundError, ValueError):
        return None
    same = meta.get("tokenizer_sha256") == tokenizer.sha256 and meta.get("source_fingerprint") == wanted
    if not same:
        return None
    sweep_folder(folder)
    return {**meta, "reused": True}


def tokenizer_meta(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of meta.json that say which tokenizer a cache was built with."""
    ids = tokenizer.special_token_ids()
    return {"tokenizer_sha256": tokenizer.sha256, "special_token_ids": ids, "expected_special_token_ids": ids}


def open_sources(names: Iterable[str], open_one: Callable[[str], Item]) -> dict[str, Item]:
    """Open every cache by name. Missing optional ones are left out with a warning.

    Raises FileNotFoundError, one line for every other cache that is missing.
    """
    opened: dict[str, Item] = {}
    missing: list[str] = []
    for name in names:
        try:
            opened[name] = open_one(name)
        except FileNotFoundError as error:
            if is_optional(name):
                warn(f"{name} is left out: {error}")
            else:
                missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return opened


def renormalised(mix: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weights of `names` in the mix, scaled to sum to 1; names that are not in it weigh 0."""
    weights = {name: mix.get(name, 0.0) for name in names}
    total = sum(weights.values())
    if not total:
        return {name: 1 / len(weights) for name in weights}
    return {name: weight / total for name, weight in weights.items()}


def warn(text: str) -> None:
    """Tell a person on stderr; the build or run goes on."""
    print(f"warning: {text}", file=sys.stderr)
