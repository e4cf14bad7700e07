"""roam: a folder of your own Markdown notes. A note is a document.

Split as the published caches were: a random permutation of the sorted paths, of which the first tenth is val.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from niels_gpt.data.text import find_files, hashes, read_text
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "roam"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """The notes of one split, in the order of the permutation; blank ones are left out."""
    chosen, paths = settings.data.roam, _files(settings)
    train, val = split_indices(len(paths), chosen.val_frac, chosen.split_seed)
    for i in val if split == "val" else train:
        if text := read_text(paths[i]):
            yield Document(text, NAME)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen, paths = settings.data.roam, _files(settings)
    return {
        "dataset_name": NAME,
        "split_rule": f"torch.randperm over sorted paths, val_frac={chosen.val_frac}, seed={chosen.split_seed}",
        "num_files": len(paths),
        "files": hashes(paths, Path(chosen.root_dir)),
    }


def split_indices(n: int, val_frac: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, val) indices of n things: val is the first max(1, n*val_frac) of a permutation, none if n < 2."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    n_val = max(1, int(n * val_frac)) if n > 1 else 0
    return order[n_val:], order[:n_val]


def _files(settings: Settings) -> list[Path]:
    chosen = settings.data.roam
    return find_files(chosen.root_dir, [chosen.glob_pattern], "data.roam.root_dir", hidden=True)
