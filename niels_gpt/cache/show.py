"""What is in the token caches, and whether it is still what was written: the commands `show` and `verify`."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from niels_gpt import files
from niels_gpt.cache.flags import chosen_roots, chosen_settings
from niels_gpt.cache.folder import whole_folder
from niels_gpt.cache.format import open_pretrain, open_sft
from niels_gpt.cache.integrity import open_folder
from niels_gpt.console import OutputConsole
from niels_gpt.data.registry import canonical_name
from niels_gpt.data.types import SPLITS
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import PHASES, Settings, tokenizer_file
from niels_gpt.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

SAMPLES = 3
SAMPLE_TOKENS = 96
TRAINED, CONTROL = "bold green", "dim cyan"


def found(args: argparse.Namespace, settings: Settings) -> tuple[list[tuple[str, Path]], list[str]]:
    """(phase/source, folder) of every cache, or of the named ones, whole or not; and a line for each name without any.

    FileNotFoundError if there are no caches at all.
    """
    roots = chosen_roots(args, settings)
    there = [
        (f"{phase}/{name}", folder)
        for phase in PHASES
        for name in _names(roots.of(phase))
        if (folder := roots.of(phase) / name) not in (roots.pretrain, roots.sft)  # one may lie in the other
    ]
    where = f"in {roots.pretrain} or {roots.sft}"
    if not there:
        raise FileNotFoundError(f"no caches {where}; build some with the command build")
    known = list(dict.fromkeys(folder.name for _, folder in there))
    wanted = list(dict.fromkeys(map(canonical_name, args.sources))) or known
    missing = [
        f"{name}: no cache of that name {where}; there is {', '.join(known)}" for name in wanted if name not in known
    ]
    return [(name, folder) for name, folder in there if folder.name in wanted], missing


def _names(root: Path) -> list[str]:
    """The caches in `root`: its folders but those of builds; and what a killed build left to be renamed."""
    folders = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    names = {re.sub(r"^\.(.+)\.new$", r"\1", name) for name in folders}
    return sorted(name for name in names if not name.startswith(".") and whole_folder(root / name).is_dir())


def show(args: argparse.Namespace) -> int:
    """Counts, sizes and samples of every cache; what the loss of a chat is taken on is in colour, or in ⟦ ⟧."""
    console, settings = OutputConsole(), chosen_settings(args)
    tokenizers = list(_tokenizers(args, settings))
    caches, missing = found(args, settings)
    bad = sum(map(_complain, missing))
    for name, folder in caches:
        try:
            _, meta, _ = open_folder(folder.parent, folder.name)
            size = sum(entry["size"] for entry in meta.get("files", {}).values())
            sized = f", {size / 1e6:,.1f} MB" if size else ""
            sha = str(meta.get("tokenizer_sha256"))[:12]
            lines: list[str | Text] = [f"✓ {name}: {summary(meta)}{sized}, tokenizer {sha}"]
            tokenizer = next((t for t in tokenizers if t.sha256 == meta.get("tokenizer_sha256")), None)
            if tokenizer is None:
                lines.append(f"  no samples: tokenizer {sha} is not here; name it with --config")
            else:
                lines += samples(name, folder, tokenizer, colour=console.is_terminal)
        except (ValueError, OSError) as error:
            bad += _complain(f"{name}: {files.explained(error)}")
            continue
        for line in lines:  # not within the try: what goes wrong here is no fault of the cache
            console.print(line, markup=False)
    return 1 if bad else 0


def _complain(line: str) -> int:
    """Say what is wrong; returns 1, to be counted."""
    print(f"✗ {line}", file=sys.stderr)
    return 1


def _tokenizers(args: argparse.Namespace, settings: Settings) -> Iterator[Tokenizer]:
    """The tokenizers that may have built the caches: the configured one, the copy beside them, and bytes."""
    beside = chosen_roots(args, settings).pretrain.parent / "tokenizer" / "spm.model"
    for path in (tokenizer_file(settings.tokenizer), beside):
        if path is not None and Path(path).is_file():
            yield load_tokenizer(path)
    yield ByteTokenizer()


def samples(name: str, folder: Path, tokenizer: Tokenizer, *, colour: bool) -> Iterator[Text]:
    """Three pieces of a cache as text: from the start, the middle and the end of its training split."""
    options: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    controls = {i: f"<{name}>" for name, i in tokenizer.special_token_ids().items()}
    if name.startswith("sft/"):
        examples = open_sft(folder.parent, folder.name, "train", **options, allow_missing_idx=True)
        for i in _spread(len(examples)):
            ids, labels = examples.example(i)
            yield _sample(f"conversation {i:,}", ids, labels, tokenizer, controls, colour)
        return
    arrays = open_pretrain(folder.parent, folder.name, "train", **options).arrays
    ends = np.cumsum([len(array) for array in arrays])
    for i in _spread(max(1, int(ends[-1]) - SAMPLE_TOKENS + 1) if len(ends) else 0):
        shard = int(np.searchsorted(ends, i, side="right"))
        ids = arrays[shard][i - (ends[shard] - len(arrays[shard])) :][:SAMPLE_TOKENS].astype(np.int64)
        yield _sample(f"token {i:,}", ids, np.full_like(ids, IGNORED), tokenizer, controls, colour)


def _spread(n: int) -> list[int]:
    return sorted({(n - 1) * k // (SAMPLES - 1) for k in range(SAMPLES)}) if n else []


def _sample(
    title: str, ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, controls: Mapping[int, str], colour: bool
) -> Text:
    cut = "…" if len(ids) > SAMPLE_TOKENS else ""
    ids, labels = ids[:SAMPLE_TOKENS], labels[:SAMPLE_TOKENS]
    trained = labels != IGNORED
    bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    line = Text(f"  {title}: ", style="dim")
    for start, stop in itertools.pairwise(bounds):
        shown = Text()
        run: list[int] = []
        for token_id in [*ids[start:stop].tolist(), None]:
            if token_id is not None and token_id not in controls:
                run.append(token_id)
                continue
            shown.append(_one_line(tokenizer.decode(run)), TRAINED if trained[start] else "none")
            shown.append(controls.get(token_id, "") if token_id is not None else "", CONTROL)
            run = []
        line.append_text(shown if colour or not trained[start] else Text.assemble("⟦", shown, "⟧"))
    return line.append(cut)


def _one_line(text: str) -> str:
    return "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in text)


def verify(args: argparse.Namespace) -> int:
    """Hash every file of the caches again."""
    caches, missing = found(args, chosen_settings(args))
    bad = sum(map(_complain, missing))
    for name, folder in caches:
        try:
            _, meta, _ = open_folder(folder.parent, folder.name, verify=True)
        except (ValueError, OSError) as error:
            bad += _complain(f"{name}: {files.explained(error)}")
            continue
        listed = meta.get("files")
        print(f"✓ {name}: {len(listed)} files are as written" if listed else f"- {name}: it records no hashes to check")
    return 1 if bad else 0


def summary(meta: Mapping[str, Any]) -> str:
    """Documents and tokens of train and val, and what was dropped."""
    tokens = {split: meta.get(f"{split}_tokens", 0) for split in SPLITS}
    if "splits" in meta:
        tokens = {split: meta["splits"][split]["num_tokens"] for split in SPLITS}
    counts = {"documents": meta.get("documents"), "tokens": tokens}
    parts = [f"{n['train']:,} + {n['val']:,} {what}" for what, n in counts.items() if n]
    if meta.get("dropped"):
        parts.append("dropped " + ", ".join(f"{count} {reason}" for reason, count in meta["dropped"].items()))
    return ", ".join(parts) + " (train + val)"
