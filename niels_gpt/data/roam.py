"""roam: a folder of your own Markdown notes. A note is a document.

Split as the published caches were: a random permutation of the sorted paths, of which the first tenth is val. Notes
that share a passage move together: val is then filled in the order of the permutation with groups that still fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from niels_gpt.data.notes.source import describe_notes, open_notes
from niels_gpt.data.notes.vault import Vault
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "roam"


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """The notes of one split, in the order of the permutation."""
    vault = open_notes(settings, NAME)
    train, val = split_vault(vault, settings)
    for i in val if split == "val" else train:
        yield Document(vault.text(i), NAME, vault.notes[i].name)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.roam
    rule = f"torch.randperm over sorted paths, val_frac={chosen.val_frac}, seed={chosen.split_seed}"
    return describe_notes(settings, NAME, rule)


def split_vault(vault: Vault, settings: Settings) -> tuple[list[int], list[int]]:
    """(train, val): the numbers of the notes that are kept, in the order of the permutation."""
    chosen = settings.data.roam
    train, val = split_indices(len(vault.notes), chosen.val_frac, chosen.split_seed)
    usable = set(vault.kept)
    return split_groups([i for i in val + train if i in usable], sum(i in usable for i in val), vault.group)


def split_indices(n: int, val_frac: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, val) indices of n things: val is the first max(1, n*val_frac) of a permutation, none if n < 2."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    n_val = max(1, int(n * val_frac)) if n > 1 else 0
    return order[n_val:], order[:n_val]


def split_groups(order: Sequence[int], n_val: int, group: Sequence[int]) -> tuple[list[int], list[int]]:
    """(train, val) of `order`: whole groups go to val, first come first served, while they fit into `n_val`.

    Where no two share a group, val is simply the first `n_val`. Of more than one, at least one is wanted for val.
    """
    wanted = max(n_val, 1) if len(order) > 1 else 0
    sizes: dict[int, int] = defaultdict(int)
    for i in order:
        sizes[group[i]] += 1
    chosen: set[int] = set()
    for name in dict.fromkeys(group[i] for i in order):
        if sizes[name] <= wanted:
            chosen.add(name)
            wanted -= sizes[name]
    return [i for i in order if group[i] not in chosen], [i for i in order if group[i] in chosen]
