"""The text a pretraining run draws from, as weighted streams: token caches, or the byte streams of a byte model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from niels_gpt import files
from niels_gpt.batching import TokenStream
from niels_gpt.cache.pretrain import open_mix
from niels_gpt.data.registry import canonical_name, is_optional
from niels_gpt.data.types import SPLITS
from niels_gpt.settings import Settings
from niels_gpt.streams import Progress, StreamBuildConfig, build_streams
from niels_gpt.tokenizer import Tokenizer

Mixes = dict[str, tuple[dict[str, TokenStream], dict[str, float]]]  # split -> streams, weights


def stream_name(source: str) -> str:
    """What the byte stream of a source is called; its published name, where that differs."""
    return "wiki" if source == "wikitext" else source


def stream_config(settings: Settings) -> StreamBuildConfig:
    """The streams that training a byte model needs: by default those of its mix, all required but optional ones."""
    data = settings.data
    mixed = dict.fromkeys(stream_name(name) for name in (*data.mix_pretrain, data.val_pretrain_source))
    enabled = tuple(mixed) if data.streams.enabled_sources is None else data.streams.enabled_sources
    needed = tuple(name for name in enabled if not is_optional(canonical_name(name)))
    return StreamBuildConfig(
        roam_root=data.roam.root_dir,
        primer_path=data.primer.path,
        cache_dir=data.caches.streams_token_cache,
        roam_val_frac=data.roam.val_frac,
        primer_val_frac=data.primer.val_frac,
        seed=data.primer.seed,
        delimiter=data.primer.delimiter,
        allow_missing_sources=data.streams.allow_missing_sources,
        enabled_sources=enabled,
        required_sources=needed if data.streams.required_sources is None else data.streams.required_sources,
        gated_notes=True,
        settings=settings,
    )


def open_mixes(settings: Settings, tokenizer: Tokenizer, T: int) -> Mixes:
    """For train and val, the text of `data.mix_pretrain` and its weights: token caches, or byte streams (built first).

    Errors are those of `cache.pretrain.open_mix` and `build_sources`.
    """
    if tokenizer.kind != "byte":
        return {split: open_mix(settings, tokenizer, split, T) for split in SPLITS}
    with _shown() as progress:
        built = build_streams(stream_config(settings), progress)
    own = {stream_name(name): name for name in (*settings.data.mix_pretrain, settings.data.val_pretrain_source)}
    on_streams = _on_streams(settings, set(built["train"]))
    mixes: Mixes = {}
    for split in SPLITS:
        streams, mix = open_mix(on_streams, tokenizer, split, T)
        mixes[split] = {own[name]: s for name, s in streams.items()}, {own[name]: p for name, p in mix.items()}
    return mixes


def _on_streams(settings: Settings, built: set[str]) -> Settings:
    """The settings with the streams that were built in place of the token caches of the mix."""
    data = settings.data
    mix = {stream_name(name): weight for name, weight in data.mix_pretrain.items()}
    val = stream_name(data.val_pretrain_source)
    left = {name: weight for name, weight in mix.items() if name in built}
    if not left or val not in built:
        what = f"the validation source {data.val_pretrain_source}" if left else "every source of data.mix_pretrain"
        raise ValueError(
            f"{what} is without a byte stream; streams are {', '.join(sorted(built))} "
            "(data.mix_pretrain, data.val_pretrain_source and data.streams choose)"
        )
    for name in sorted(mix.keys() - left.keys()):
        print(f"warning: {name} is left out of the mix: it has no byte stream", file=sys.stderr)
    caches = data.caches.model_copy(update={"pretrain_token_cache": data.caches.streams_token_cache})
    changed = {"caches": caches, "mix_pretrain": left, "val_pretrain_source": val}
    return settings.model_copy(update={"data": data.model_copy(update=changed)})


def text_hashes(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the training bytes of every source: what a run on streams depends on."""
    root = Path(settings.data.caches.streams_token_cache)
    notes = {name: root / f"{stream_name(name)}_train.meta.json" for name in sorted(names)}
    return {name: files.read_json(note).get("sha256", "") for name, note in notes.items() if note.is_file()}


@contextmanager
def _shown() -> Iterator[Progress]:
    """A line on stderr that counts megabytes while the block runs, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("byte streams", total=None)

        def update(name: str, n_bytes: int) -> None:
            bar.update(task, description=f"byte stream {name}: {n_bytes / 1e6:,.1f} MB")

        yield update
