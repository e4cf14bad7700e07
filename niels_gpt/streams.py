"""Byte streams: every source as one run of UTF-8 bytes, for byte models.

    train, val = build_sources(StreamBuildConfig())      # name -> bytes

`CACHE_DIR/{source}_{split}.bin` holds the bytes and nothing else, the `.meta.json` beside it what they were made of. A
stream is used again while that is unchanged. wiki is read again through `datasets` every time, only to compare.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

from niels_gpt import files, paths
from niels_gpt.data.notes.secrets import mask
from niels_gpt.data.primer import split_primer_text
from niels_gpt.data.registry import get_source
from niels_gpt.data.text import read_text
from niels_gpt.data.types import SPLITS
from niels_gpt.settings import NotesSettings, Settings, StreamSource, default_settings
from niels_gpt.special_tokens import assert_no_special_collision
from niels_gpt.unicode import valid_unicode

STREAM_SOURCES: tuple[str, ...] = get_args(StreamSource)
FIRST_SOURCES = ("wiki", "roam", "primer")
NOTES = "*.md"

_DATA = default_settings().data
_HINTS = {
    "wiki": "connect once, or do without it: allow_missing_sources=True or required_sources=() (quality drops)",
    "roam": "put Markdown notes there, or remove roam from enabled_sources",
    "primer": "put the file there, or remove primer from enabled_sources and required_sources",
}
Progress = Callable[[str, int], None]  # source/split, bytes so far
Streams = dict[str, Path]  # source -> file


@dataclass(frozen=True)
class StreamBuildConfig:
    """Where text comes from, how it is split, and which sources there must be. One seed splits notes and primer.

    Notes are joined as they are, but for secrets, like published streams. With `gated_notes` they are the documents of
    the token caches instead: cleaned, without repeats, split in groups, all as `settings.data` says (data/roam.py).
    """

    roam_root: str | Path = Path(_DATA.roam.root_dir)
    primer_path: str | Path = Path(_DATA.primer.path)
    cache_dir: str | Path = Path(_DATA.caches.streams_token_cache)
    doc_separator: str = "\n\n"
    roam_val_frac: float = _DATA.roam.val_frac
    primer_val_frac: float = _DATA.primer.val_frac
    seed: int = _DATA.primer.seed
    delimiter: str = _DATA.primer.delimiter
    force_rebuild: bool = False
    allow_missing_sources: bool = False
    enabled_sources: tuple[str, ...] = FIRST_SOURCES
    required_sources: tuple[str, ...] = FIRST_SOURCES
    gated_notes: bool = False
    settings: Settings = field(default_factory=default_settings, repr=False)  # of the sources not named above


def build_sources(cfg: StreamBuildConfig, *, T: int | None = None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(train, val): the bytes of every enabled source that is there; built where they are not up to date.

    T: context the streams must fill; None = the default of `model.T`.

    Raises:
        ValueError: unknown or contradictory source names, a special token literal in a text, or a stream of less than
            T+1 bytes.
        RuntimeError: required sources are missing (unless allowed), each with what to do, or nothing is left.
    """
    built = build_streams(cfg)
    least = (default_settings().model.T if T is None else T) + 1
    short = [
        f"{name} ({split}): {size} bytes"
        for split in SPLITS
        for name, path in built[split].items()
        if (size := path.stat().st_size) < least
    ]
    if short:
        raise ValueError(
            f"Stream(s) too short: {', '.join(short)}; at least T+1 = {least} bytes are needed; lower T or add data"
        )
    train, val = ({name: path.read_bytes() for name, path in built[split].items()} for split in SPLITS)
    return train, val


def build_streams(cfg: StreamBuildConfig, progress: Progress | None = None) -> dict[str, Streams]:
    """split -> source -> file, as `build_sources` but without reading them or asking for a length."""
    _check_names(cfg)
    built: dict[str, Streams] = {split: {} for split in SPLITS}
    missing: dict[str, OSError] = {}
    for name in cfg.enabled_sources:
        try:
            found = {split: _build(cfg, _recipe(cfg, name, split), progress) for split in SPLITS}
        except OSError as error:
            if files.is_disk_full(error) or isinstance(error, PermissionError):
                raise
            missing[name] = error
        else:
            for split, path in found.items():
                built[split][name] = path
    lacking = [name for name in cfg.required_sources if name in missing]
    if lacking and not cfg.allow_missing_sources:
        lines = "".join(f"\n- {name}: {missing[name]}; {_HINTS.get(name, 'or do without it')}" for name in lacking)
        raise RuntimeError(f"byte streams are missing:{lines}")
    for name, problem in missing.items():
        print(f"warning: no byte stream {name}: {problem}", file=sys.stderr)
    if not all(built.values()):
        raise RuntimeError(
            f"no byte stream is left of {', '.join(cfg.enabled_sources) or 'no enabled source'}; "
            "enable sources whose text is there (enabled_sources)"
        )
    return built


def _check_names(cfg: StreamBuildConfig) -> None:
    if unknown := [name for name in cfg.enabled_sources if name not in STREAM_SOURCES]:
        raise ValueError(f"unknown byte stream {', '.join(unknown)}; there are {', '.join(STREAM_SOURCES)}")
    if extra := [name for name in cfg.required_sources if name not in cfg.enabled_sources]:
        raise ValueError(f"required_sources has {', '.join(extra)}, missing from enabled_sources; add or remove them")


# What a stream is made of


@dataclass(frozen=True)
class _Recipe:
    """`meta` is known before anything is read; where it says too little, `reread` has the text itself compared."""

    meta: dict[str, Any]
    texts: Callable[[], Iterator[str]]
    separator: str
    reread: bool = False

    @property
    def name(self) -> str:
        return f"{self.meta['source']}_{self.meta['split']}"


def _recipe(cfg: StreamBuildConfig, name: str, split: str) -> _Recipe:
    """FileNotFoundError if its files are not there."""
    if name == "roam" and not cfg.gated_notes:
        return _roam(cfg, split)
    if name == "primer":
        return _primer(cfg, split)
    source = get_source(name)

    def texts() -> Iterator[str]:
        return (document.text for document in source.documents(cfg.settings, split)) if source.documents else iter(())

    meta: dict[str, Any] = {"source": name, "split": split, "sep": cfg.doc_separator}
    if name != "wiki":
        meta["made_of"] = source.describe(cfg.settings, "pretrain")
    return _Recipe(meta, texts, cfg.doc_separator, reread=name == "wiki")


def split_paths(found: list[Path], val_frac: float, seed: int) -> tuple[list[Path], list[Path]]:
    """(train, val) of sorted paths: shuffled by Python's generator, val is the first max(1, n*val_frac), if n > 1.

    This is the split of the published streams; the token caches of the same notes split otherwise (data/roam.py).
    """
    order = list(found)
    random.Random(seed).shuffle(order)
    n_val = max(1, int(len(order) * val_frac)) if len(order) > 1 else 0
    return order[n_val:], order[:n_val]


def _roam(cfg: StreamBuildConfig, split: str) -> _Recipe:
    root = Path(cfg.roam_root)
    found = sorted(path.resolve() for path in root.rglob(NOTES) if path.is_file()) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(f"there are no notes ({NOTES}) in {root}")
    chosen = split_paths(found, cfg.roam_val_frac, cfg.seed)[SPLITS.index(split)]
    stats = [path.stat() for path in chosen]
    listed = [
        {"path": str(path), "mtime_ns": stat.st_mtime_ns, "size": stat.st_size}
        for path, stat in zip(chosen, stats, strict=True)
    ]
    meta = {
        **{"source": "roam", "split": split, "sep": cfg.doc_separator},
        **{"files": listed, "seed": cfg.seed, "val_frac": cfg.roam_val_frac},
    }
    notes = cfg.settings.data.notes
    if notes.secrets != "keep":  # published streams do not have the key, and may hold secrets
        meta["secrets"] = notes.secrets
    return _Recipe(meta, lambda: _without_secrets(map(read_text, chosen), notes), cfg.doc_separator)


def _without_secrets(texts: Iterable[str], notes: NotesSettings) -> Iterator[str]:
    """The texts as `data.notes.secrets` wants them: masked, left out, or as they are. Nothing else is cleaned here."""
    for text in texts:
        masked, found = (text, {}) if notes.secrets == "keep" else mask(text, notes.phone_region)
        if not (found and notes.secrets == "skip"):
            yield masked


def _primer(cfg: StreamBuildConfig, split: str) -> _Recipe:
    path = paths.find(cfg.primer_path)
    if path is None:
        raise FileNotFoundError(f"there is no {cfg.primer_path}")
    found, stat = path.resolve(), path.stat()
    meta = {
        **{"source": "primer", "split": split, "path": str(found), "mtime_ns": stat.st_mtime_ns, "size": stat.st_size},
        **{"delimiter": cfg.delimiter, "seed": cfg.seed, "val_frac": cfg.primer_val_frac},
    }

    def texts() -> Iterator[str]:
        parts = split_primer_text(
            read_text(found), delimiter=cfg.delimiter, val_frac=cfg.primer_val_frac, seed=cfg.seed
        )
        yield parts[SPLITS.index(split)]

    return _Recipe(meta, texts, cfg.doc_separator)


# Building


def _build(cfg: StreamBuildConfig, recipe: _Recipe, progress: Progress | None) -> Path:
    """The file of a stream, written unless it is up to date."""
    path = Path(cfg.cache_dir) / f"{recipe.name}.bin"
    note = path.with_suffix(".meta.json")
    if not cfg.force_rebuild and _up_to_date(path, note, recipe, progress):
        return path
    with files.atomic_write(path) as file:
        counts = _copy(recipe, file, progress)
    known = counts if recipe.reread else {key: counts[key] for key in ("n_bytes", "sha256")}
    files.write_json(note, {**recipe.meta, **known})
    return path


def _up_to_date(path: Path, note: Path, recipe: _Recipe, progress: Progress | None) -> bool:
    if not (path.is_file() and note.is_file()):
        return False
    try:
        old = files.read_json(note)
    except ValueError:
        return False
    if not isinstance(old, dict) or any(old.get(key) != value for key, value in recipe.meta.items()):
        return False
    if recipe.reread:  # streams from elsewhere may lack the hash
        counts = _copy(recipe, None, progress)
        if any(old.get(key, None if key in ("n_docs", "total_chars") else now) != now for key, now in counts.items()):
            return False
    return "sha256" not in old or files.sha256_file(path) == old["sha256"]


def _copy(recipe: _Recipe, file: IO[bytes] | None, progress: Progress | None) -> dict[str, Any]:
    """Write the stream, if there is a file, and count it."""
    digest, n_docs, n_chars, n_bytes = hashlib.sha256(), 0, 0, 0
    for text in recipe.texts():
        assert_no_special_collision(text, dataset=recipe.name, doc_index=n_docs, field="text")
        content = valid_unicode((recipe.separator if n_docs else "") + text).encode("utf-8")
        digest.update(content)
        if file is not None:
            file.write(content)
        n_docs, n_chars, n_bytes = n_docs + 1, n_chars + len(text), n_bytes + len(content)
        if progress:
            progress(recipe.name, n_bytes)
    return {"n_docs": n_docs, "total_chars": n_chars, "n_bytes": n_bytes, "sha256": digest.hexdigest()}
