"""From a checkpoint file to everything that chatting needs: model, tokenizer and chat format."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from niels_gpt import files
from niels_gpt.chat_format import ChatFormat, chat_format_for
from niels_gpt.checkpoint.folder import sidecar_path
from niels_gpt.checkpoint.format import Checkpoint, load_checkpoint
from niels_gpt.checkpoint.weights import architecture_of, build_model
from niels_gpt.config import V1
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import Settings, tokenizer_file, validate_overrides
from niels_gpt.settings.legacy import translate
from niels_gpt.tokenizer import (
    DEFAULT_TOKENIZER_PATH,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

BYTES = 256
TOKENIZER_BESIDE = "spm.model"  # in the checkpoint's folder, as `niels-gpt download` puts it there


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with the tokenizer and chat format it was trained with."""

    model: GPT
    tokenizer: Tokenizer
    chat_format: ChatFormat
    settings: Settings | None  # of the run that made it; None where it does not say, or says it in an older schema
    checkpoint_path: Path
    step: int


def load_model(
    path: str | Path,
    *,
    device: str | torch.device,
    tokenizer_path: str | Path | None = None,
    ignore_tokenizer_hash: bool = False,
) -> LoadedModel:
    """Read a checkpoint of any generation.

    The tokenizer is `tokenizer_path` if given, else the one inside the checkpoint, else one of these files: the one its
    settings name, spm.model beside it, the default. Its sha256 must be the recorded one unless `ignore_tokenizer_hash`.
    Raises like `load_checkpoint`, and ValueError for a tokenizer that does not fit.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, device=device)
    model = build_model(checkpoint).eval()
    settings = recorded_settings(checkpoint, path)
    tokenizer: Tokenizer
    if is_byte_model(checkpoint):
        if tokenizer_path is not None:
            raise ValueError(f"{path} is a byte model: it has no tokenizer file, leave {tokenizer_path} out")
        tokenizer = ByteTokenizer()
    else:
        tokenizer = _subword_tokenizer(checkpoint, path, settings, tokenizer_path, ignore_tokenizer_hash)
    _check_vocabulary(tokenizer, model.cfg.V)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        chat_format=chat_format_for(tokenizer),
        settings=settings,
        checkpoint_path=path,
        step=checkpoint["step"],
    )


def is_byte_model(checkpoint: Checkpoint) -> bool:
    """True if ids are bytes: V is 256 and no tokenizer is embedded or recorded.

    Published byte models carry no `_settings_meta` at all and are of the V1 architecture; ours record the hash None.
    """
    if checkpoint["model_cfg"].get("V") != BYTES or checkpoint["tokenizer_model"] is not None:
        return False
    meta = settings_meta(checkpoint)
    return architecture_of(checkpoint["model_state"]) == V1 if meta is None else meta.get("tokenizer_sha256") is None


def recorded_tokenizer(checkpoint: Checkpoint) -> str | None:
    """sha256 of the tokenizer that the model was trained with; None if nothing says it."""
    recorded: str | None = (settings_meta(checkpoint) or {}).get("tokenizer_sha256")
    embedded = checkpoint["tokenizer_model"]
    if recorded is None and embedded is not None:
        return files.sha256_bytes(embedded.numpy().tobytes())
    return recorded


def settings_meta(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Where its settings came from: run_id, phase, tokenizer_sha256 ...; None in checkpoints that do not say."""
    meta = checkpoint["train_cfg"].get("_settings_meta")
    return meta if isinstance(meta, dict) else None


def recorded_settings(checkpoint: Checkpoint, path: Path) -> Settings | None:
    """Those inside the file, which cannot belong to other weights, else the sidecar's; None if neither can be read."""
    inside, beside = (checkpoint["resume"] or {}).get("settings"), sidecar_path(path)
    for read in (lambda: inside, lambda: files.read_json(beside) if beside.is_file() else None):
        try:
            record = read()
            if isinstance(record, dict):
                return validate_overrides(translate(record)[0])
        except ValueError:  # another schema or a damaged sidecar: weights and tokenizer do not depend on it
            continue
    return None


def _subword_tokenizer(
    checkpoint: Checkpoint,
    path: Path,
    settings: Settings | None,
    tokenizer_path: str | Path | None,
    ignore_hash: bool,
) -> SentencePieceTokenizer:
    embedded = checkpoint["tokenizer_model"]
    content = None if embedded is None else embedded.numpy().tobytes()
    expected = recorded_tokenizer(checkpoint)
    if tokenizer_path is None and content is not None:
        inside = f"the tokenizer inside {path}"
        tokenizer, where = SentencePieceTokenizer.from_bytes(content, name=inside), inside
    else:
        file = Path(tokenizer_path) if tokenizer_path is not None else _known_tokenizer(path, settings, expected)
        if not file.is_file():
            sha = f" (sha256 {expected})" if expected else ""
            raise FileNotFoundError(f"{path} needs its tokenizer{sha}, not found at {file}; name it with --tokenizer")
        tokenizer, where = load_tokenizer(file), str(file)
    if expected is None:
        print(f"warning: {path} does not record its tokenizer; using {where} unchecked", file=sys.stderr)
    elif tokenizer.sha256 != expected and not ignore_hash:
        raise ValueError(
            f"tokenizer hash mismatch: {path} was trained with the tokenizer sha256 {expected}, {where} has"
            f" {tokenizer.sha256}; name the right one with --tokenizer, or pass --ignore-tokenizer-hash"
        )
    return tokenizer


def _known_tokenizer(path: Path, settings: Settings | None, expected: str | None) -> Path:
    """The first tokenizer file of the usual places that has the expected hash, else the first, else the default."""
    named = tokenizer_file(settings.tokenizer) if settings is not None else None
    places = [named] if named else []
    places += [path.with_name(TOKENIZER_BESIDE), Path(DEFAULT_TOKENIZER_PATH)]
    found = [place for place in places if place.is_file()]
    right = [place for place in found if expected is not None and files.sha256_file(place) == expected]
    return (right or found or places[-1:])[0]


def _check_vocabulary(tokenizer: Tokenizer, V: int) -> None:
    beyond = {name: number for name, number in tokenizer.special_token_ids().items() if number >= V}
    if beyond:
        raise ValueError(f"the model has {V} ids, but the tokenizer's special tokens lie beyond them: {beyond}")
    if tokenizer.vocab_size > V:
        print(f"warning: the tokenizer has {tokenizer.vocab_size} ids, the model only {V}", file=sys.stderr)
