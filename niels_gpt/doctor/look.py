"""Finding out what is around: disk, folders that can be written, compiled code, text, tokenizers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from niels_gpt import paths
from niels_gpt.cache.integrity import open_folder
from niels_gpt.config import NEW
from niels_gpt.data.registry import get_source, is_optional
from niels_gpt.doctor.checks import INSTALLERS, Surroundings, Text
from niels_gpt.infer.native import decoder
from niels_gpt.model.gpt import GPT
from niels_gpt.model.native import ops
from niels_gpt.settings import Settings, tokenizer_file
from niels_gpt.settings.tree import model_config_of

BYTES_PER_WEIGHT = 12  # of a checkpoint: the weight itself and the optimizer's two moments
EXTRA_CHECKPOINTS = 3  # best, latest and the one being written
ROOM = 250 * 10**6  # bytes for caches, tokenizer, logs and the system


def look_around(settings: Settings, config: str | None) -> Surroundings:
    """What surrounds a run of these settings in the current folder. Compiles native code if that was never done."""
    folder = Path.cwd()
    return Surroundings(
        folder=str(folder),
        free=shutil.disk_usage(folder).free,
        needed=needed_bytes(settings),
        unwritable=tuple(unwritable(settings)),
        kernels=ops.missing(),
        decoder=decoder.missing(),
        cxx_variable=os.environ.get("CXX"),
        installer=next((name for name in INSTALLERS if shutil.which(name)), None),
        texts=tuple(texts(settings)),
        tokenizer=tokenizer_of(settings),
        other_tokenizers=tuple(sorted(str(path) for path in Path("artifacts/tokenizer").glob("*/spm.model"))),
        config=config,
    )


def needed_bytes(settings: Settings) -> int:
    """Bytes of disk for the checkpoints of both phases, and some room."""
    arch = type(NEW)(*(getattr(settings.model, name) for name in NEW.__dataclass_fields__))
    with torch.device("meta"):
        parameters = GPT(model_config_of(settings.model), arch).num_parameters
    training = settings.training
    kept = sum(phase.keep_last + EXTRA_CHECKPOINTS for phase in (training.pretrain, training.sft))
    return BYTES_PER_WEIGHT * parameters * kept + ROOM


def unwritable(settings: Settings) -> Iterator[tuple[str, str]]:
    """Folders that a run writes to and cannot, with the reason: tried, not asked."""
    caches = settings.data.caches
    wanted = [Path(), paths.CHECKPOINT_DIR, paths.RUNS_DIR, Path(caches.pretrain_token_cache)]
    for folder in dict.fromkeys(wanted):
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            yield str(folder.resolve()), error.strerror or str(error)


def texts(settings: Settings) -> Iterator[Text]:
    """Each source of the pretraining mix: is there a cache, and if not, can it be built without a network?"""
    for name in settings.data.mix_pretrain:
        optional = is_optional(name)
        try:
            open_folder(settings.data.caches.pretrain_token_cache, name)
            yield Text(name, cached=True, optional=optional)
            continue
        except (OSError, ValueError):
            pass
        if get_source(name).from_hub:
            trouble = f"{name} has no cache here and comes from the Hugging Face hub"
            yield Text(name, cached=False, trouble=trouble, optional=optional)
            continue
        try:
            get_source(name).describe(settings, "pretrain")
            yield Text(name, cached=False, optional=optional)
        except (OSError, ValueError, ImportError) as error:
            yield Text(name, cached=False, trouble=f"{name}: {error}", optional=optional)


def tokenizer_of(settings: Settings) -> str | None:
    if settings.tokenizer.type == "byte":
        return "bytes"
    found = tokenizer_file(settings.tokenizer)
    return None if found is None else str(found)
