"""Small caches written by hand, and notes with the settings to build caches of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from niels_gpt.cache.encode import Block
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.writing import PretrainWriter, writing_pretrain, writing_sft
from niels_gpt.settings import Settings, validate_overrides

SHA = "ab" * 32
SPECIALS = {"sys": 3, "usr": 4, "asst": 5, "eot": 6}
META = {"tokenizer_sha256": SHA, "special_token_ids": SPECIALS}


def add_document(writer: PretrainWriter, split: str, ids: Iterable[int], separator: int | None = None) -> None:
    """One document as a block of its own; its text counts as a byte for each id."""
    whole = np.array([*ids, *([] if separator is None else [separator])], dtype=np.uint16)
    size = len(whole) - (separator is not None)
    writer.add_block(split, Block(whole, np.array([len(whole)]), np.array([size])), 0, len(whole))


def build_pretrain_cache(root: Path, n: int = 300, *, shard_bytes: int = 128, separator: int | None = 6) -> Path:
    options: dict[str, Any] = {"vocab_size": 512, "separator": separator, "shard_bytes": shard_bytes}
    with writing_pretrain(root / "notes", dict(META), **options) as w:
        add_document(w, "val", range(100, 150), separator)
        for start in range(0, n, 30):
            add_document(w, "train", [7 + (start + i) % 500 for i in range(30)], separator)
    return root / "notes"


def build_sft_cache(root: Path) -> Path:
    with writing_sft(root / "talk", dict(META), vocab_size=512) as w:
        for i in range(12):
            ids = [4, 100 + i, 6, 5, *range(200, 203 + i), 6]
            w.add("val" if i < 3 else "train", ids, [-100] * 4 + ids[4:], 3 + i)
    return root / "talk"


def data_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".verified")


def write_notes(folder: Path, n: int = 20, words: int = 30) -> Path:
    for i in range(n):
        path = folder / f"part {i % 3}" / f"note {i:02d}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# Note {i}\n\n" + f"naïve words of {i} " * words, encoding="utf-8")
    return folder


def settings_for(tmp_path: Path, mix: dict[str, float] | None = None, **data: Any) -> Settings:
    folders = {name: {"root_dir": str(tmp_path / name)} for name in ("text", "roam")}
    caches = {"pretrain_token_cache": str(tmp_path / "cache" / "pretrain")}
    mixed = {"mix_pretrain": mix} if mix else {}
    model = {"V": 512, "T": 32}
    return validate_overrides(
        {"data": {**folders, "caches": caches, **mixed, **data}, "model": model, "tokenizer": {"vocab_size": 512}}
    )


def with_caches(settings: Settings, **caches: Any) -> Settings:
    """The settings with other values in `data.caches`."""
    changed = settings.data.caches.model_copy(update=caches)
    return settings.model_copy(update={"data": settings.data.model_copy(update={"caches": changed})})


def build(settings: Settings, tokenizer: Any, source: str, *, caches: Any = None, **options: Any) -> dict[str, Any]:
    settings = with_caches(settings, **(caches or {}))
    root = settings.data.caches.pretrain_token_cache
    return build_pretrain(settings, tokenizer, source, **{"root": root, **options})
