"""Documents whose tokens are in a cache already: a build that finds a text again copies its tokens.

So adding a file to a folder tokenizes that file alone. Which tokens belong to which text stands in the index of the
cache (`format.DOCUMENT`); the cache is checked like any other before its tokens are used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from niels_gpt.cache.format import DOCUMENT, TOKEN, index_name
from niels_gpt.cache.integrity import open_folder
from niels_gpt.data.types import SPLITS
from niels_gpt.tokenizer import Tokenizer


class KnownDocuments:
    """Finds the ids of a text by the first half of its sha256; empty where the cache at `folder` does not serve."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, separator: int | None, version: int) -> None:
        self._shards: list[list[np.ndarray]] = []
        self._keys, self._first = np.empty((0, 2), dtype="<u8"), np.empty(0, dtype="<u8")
        try:
            folder, meta, _ = open_folder(folder.parent, folder.name)
        except (FileNotFoundError, ValueError):
            return
        listed = meta.get("files", {})
        same = (
            tokenizer.sha256 is not None
            and meta.get("tokenizer_sha256") == tokenizer.sha256
            and meta.get("build_version") == version
            and meta.get("document_separator") == (None if separator is None else "eot")
        )
        if not same or any(index_name(split) not in listed for split in SPLITS):
            return
        keys, spans = [], []
        for i, split in enumerate(SPLITS):
            index = np.fromfile(folder / index_name(split), dtype=DOCUMENT)
            ends = index["end"].astype(np.int64)
            starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
            keys.append(np.frombuffer(index["digest"].tobytes(), dtype="<u8").reshape(-1, 2))
            spans.append(np.stack([np.full_like(ends, i), starts, ends], axis=1))
            names = sorted(name for name in listed if name.startswith(f"{split}/") and listed[name]["size"])
            self._shards.append([np.memmap(folder / name, dtype=TOKEN, mode="r") for name in names])
        all_keys, all_spans = np.concatenate(keys), np.concatenate(spans)
        order = np.lexsort((all_keys[:, 1], all_keys[:, 0]))
        self._keys, self._spans = all_keys[order], all_spans[order]
        self._first = np.ascontiguousarray(self._keys[:, 0])

    def __call__(self, digest: bytes) -> np.ndarray | None:
        """The ids of the text with this digest, separator included, as uint16; None if it is not known."""
        key = np.frombuffer(digest, dtype="<u8")
        at = int(np.searchsorted(self._first, key[0]))
        while at < len(self._keys) and self._keys[at, 0] == key[0]:
            if self._keys[at, 1] == key[1]:
                split, start, end = map(int, self._spans[at])
                return self._span(self._shards[split], start, end)
            at += 1
        return None

    @staticmethod
    def _span(shards: list[np.ndarray], start: int, end: int) -> np.ndarray:
        parts, first = [np.empty(0, dtype=TOKEN)], 0
        for shard in shards:
            if first < end and start < first + len(shard):
                parts.append(shard[max(0, start - first) : end - first])
            first += len(shard)
        return np.concatenate(parts)
