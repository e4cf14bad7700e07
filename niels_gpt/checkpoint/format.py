"""The checkpoint file: one `.pt` of plain tensors and values, saved whole or not at all, loaded without running code.

Both published generations and the models of this project share it. `torch.load` does not notice a flipped bit, so a
file is checked against its zip checksums after it is written and before it is loaded.
"""

from __future__ import annotations

import errno
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn

from niels_gpt import files
from niels_gpt.checkpoint.plain import check_finite, plain, tensor_bytes
from niels_gpt.checkpoint.weights import check_weights, model_config_of
from niels_gpt.config import ModelConfig, TrainConfig, to_dict

if TYPE_CHECKING:
    from niels_gpt.settings import ResolvedSettings

FORMAT_VERSION = 1  # of the `resume` record; the six published keys have no version
REQUIRED = ("model_cfg", "train_cfg", "model_state", "step")
ZIP_OVERHEAD = 1 << 20  # bytes for pickle, alignment and directory, when free space is compared


class Checkpoint(TypedDict):
    """A loaded file; what it does not hold is None."""

    model_cfg: dict[str, Any]  # the eight keys of ModelConfig; others, such as `_raw`, are ignored
    train_cfg: dict[str, Any]
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None
    step: int
    best_val_loss: float | None
    resume: dict[str, Any] | None  # whatever the trainer needs to go on to the bit
    tokenizer_model: Tensor | None  # (N,) uint8: the SentencePiece model file


_TYPES: dict[str, tuple[type, ...]] = {
    "model_cfg": (dict,),
    "train_cfg": (dict,),
    "model_state": (dict,),
    "optimizer_state": (dict, type(None)),
    "step": (int,),
    "best_val_loss": (float, int, type(None)),
    "resume": (dict, type(None)),
    "tokenizer_model": (Tensor, type(None)),
}


class HasState(Protocol):
    """An optimizer, or several behind one face."""

    def state_dict(self) -> dict[str, Any]: ...


def training_record(resolved: ResolvedSettings) -> dict[str, Any]:
    """The `train_cfg` of a checkpoint: the 27 keys, the phase's settings under `_raw`, and where they came from."""
    meta = {
        "run_id": resolved.run_id,
        "resolved_settings_path": None if resolved.resolved_path is None else str(resolved.resolved_path),
        "overrides_source": resolved.overrides_source,
        "tokenizer_sha256": resolved.tokenizer_sha256,
        "phase": resolved.phase,
    }
    return {**to_dict(resolved.train_cfg), "_raw": resolved.training.model_dump(mode="json"), "_settings_meta": meta}


def save_checkpoint(
    path: str | Path,
    *,
    model_cfg: ModelConfig | Mapping[str, Any],
    train_cfg: TrainConfig | Mapping[str, Any],
    model: nn.Module | Mapping[str, Tensor],
    optimizer: HasState | Mapping[str, Any] | None,
    step: int,
    best_val_loss: float | None,
    resume: Mapping[str, Any] | None = None,
    tokenizer_model: bytes | Tensor | None = None,
) -> None:
    """Replace `path` by a checkpoint, durably and verified; keys whose value is None are absent.

    model, optimizer: objects or their state dicts. A `best_val_loss` that is not finite counts as None.
    ValueError: something is not plain, not finite, or not the weights of `model_cfg`. OSError: the disk refused (errno
    ENOSPC if it is full); `path` then holds what it held, or the new content if only its folder's fsync failed.
    """
    path = Path(path)
    config = model_config_of(model_cfg)
    best = None if best_val_loss is None or not math.isfinite(best_val_loss) else best_val_loss
    values = {
        "model_cfg": to_dict(config),
        "train_cfg": dict(train_cfg) if isinstance(train_cfg, Mapping) else to_dict(train_cfg),
        "model_state": dict(_state_of(model)),
        "step": int(step),
        "optimizer_state": None if optimizer is None else dict(_state_of(optimizer)),
        "best_val_loss": best,
        "resume": None if resume is None else {"format_version": FORMAT_VERSION, **resume},
        "tokenizer_model": _as_uint8(tokenizer_model),
    }
    content = {key: plain(value, key) for key, value in values.items() if value is not None}
    content["model_state"] = {k: v.float() if v.is_floating_point() else v for k, v in content["model_state"].items()}
    check_weights(config, content["model_state"])
    check_finite(content.get("optimizer_state"), "optimizer_state")
    needed = tensor_bytes(content) + ZIP_OVERHEAD
    with disk_full_explained(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, "not enough free space")
        with files.replacing(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(content, file)
            with open(temporary, "rb") as file:
                verify(file, temporary)


def _state_of(owner: nn.Module | HasState | Mapping[str, Any]) -> Mapping[str, Any]:
    return owner if isinstance(owner, Mapping) else owner.state_dict()


def _as_uint8(model_file: bytes | Tensor | None) -> Tensor | None:
    if isinstance(model_file, bytes):
        return torch.frombuffer(bytearray(model_file), dtype=torch.uint8) if model_file else None
    return model_file


@contextmanager
def disk_full_explained(path: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, in whichever disguise, into one OSError(ENOSPC) that says what is needed and what is free."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
        cause = error.__context__ if hidden else error  # torch.save hides a failed write behind its own RuntimeError
        if cause is None or not files.is_disk_full(cause):
            raise cause or error from None
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {path} needs about {needed / 1e6:,.1f} MB and"
            f" {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free here (quotas and file-size limits count too);"
            " the previous file is untouched. Free some space and try again",
        ) from None


def verify(file: IO[bytes], path: Path) -> None:
    """Check an open checkpoint against its zip checksums; ValueError says whether it is damaged or something else."""
    size = file.seek(0, 2)
    file.seek(0)
    if file.read(2) != b"PK":
        raise ValueError(f"{path} is not a checkpoint: not a zip archive as torch.save writes it")
    try:
        with zipfile.ZipFile(file) as archive:
            items = archive.infolist()
            stored = all(item.compress_type == zipfile.ZIP_STORED for item in items)
            honest = sum(item.file_size for item in items) <= size  # no member counted twice, nothing to blow up
            pickled = any(item.filename.endswith("/data.pkl") for item in items)
            bad = archive.testzip() if stored and honest else None
    except Exception as error:  # a flipped bit in the directory surfaces as almost anything
        raise ValueError(f"{path} is damaged or cut short ({error}); use an earlier checkpoint") from None
    if bad is not None:
        raise ValueError(f"{path} is damaged: {bad} does not match its checksum; use an earlier checkpoint")
    if not (stored and honest and pickled):
        raise ValueError(f"{path} is not a checkpoint: a zip archive, but not one that torch.save writes")
    file.seek(0)


def is_good(path: Path) -> bool:
    """True if the file is there and matches its checksums."""
    try:
        with open(path, "rb") as file:
            verify(file, path)
    except (OSError, ValueError):
        return False
    return True


def load_checkpoint(path: str | Path, *, device: str | torch.device) -> Checkpoint:
    """Verify and read a checkpoint: weights to `device`, optimizer state to the CPU (its optimizer places it).

    No code in the file runs. FileNotFoundError, or ValueError with one sentence: not a checkpoint, damaged, contains
    pickled code, lacks a key, written by a newer version.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the .pt file in it")
    with open(path, "rb") as file:  # one handle: a file published meanwhile cannot slip between check and read
        verify(file, path)
        content = _unpickle(file, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint: it lacks {', '.join(missing)}")
    found = {key: plain(content.get(key), f"{path}: {key}") for key in _TYPES}
    _check_types(found, path)
    version = (found["resume"] or {}).get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{path} was written by a newer niels-gpt (format {version}); update this one to read it")
    if found["best_val_loss"] is not None and not math.isfinite(found["best_val_loss"]):
        found["best_val_loss"] = None  # published SFT runs could record NaN, which no later loss can beat
    found["model_state"] = {name: tensor.to(device) for name, tensor in found["model_state"].items()}
    return cast(Checkpoint, found)


def _unpickle(file: IO[bytes], path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} contains pickled code{f' ({name[1]})' if name else ''} and is refused:"
            " a checkpoint holds only tensors and plain values"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from None


def _check_types(found: dict[str, Any], path: Path) -> None:
    for key, kinds in _TYPES.items():
        if not isinstance(found[key], kinds) or isinstance(found[key], bool):
            raise ValueError(f"{path} is not a checkpoint: its {key} is a {type(found[key]).__name__}")
    for name, tensor in found["model_state"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} is not a checkpoint: its model_state.{name} is a {type(tensor).__name__}")
