"""From a checkpoint file to everything that chatting needs: model, tokenizer and chat format."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
from niels_gpt.settings import Settings
from niels_gpt.tokenizer import (
    DEFAULT_TOKENIZER_PATH,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

BYTES = 256


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

    The tokenizer is `tokenizer_path` if given, else the one inside the checkpoint, else the one its settings name, else
    the default; its sha256 must be the recorded one unless `ignore_tokenizer_hash`. Raises like `load_checkpoint`, and
    ValueError for a tokenizer that does not fit.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, device=device)
    model = build_model(checkpoint).eval()
    recorded = list(_recorded_settings(checkpoint, path))
    tokenizer: Tokenizer
    if is_byte_model(checkpoint):
        if tokenizer_path is not None:
            raise ValueError(f"{path} is a byte model: it has no tokenizer file, leave {tokenizer_path} out")
        tokenizer = ByteTokenizer()
    else:
        tokenizer = _subword_tokenizer(checkpoint, path, recorded, tokenizer_path, ignore_tokenizer_hash)
    _check_vocabulary(tokenizer, model.cfg.V)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        chat_format=chat_format_for(tokenizer),
        settings=_parse(recorded),
        checkpoint_path=path,
        step=checkpoint["step"],
    )


def is_byte_model(checkpoint: Checkpoint) -> bool:
    """True if ids are bytes: V is 256 and no tokenizer is embedded or recorded.

    Published byte models carry no `_settings_meta` at all and are of the V1 architecture; ours record the hash None.
    """
    if checkpoint["model_cfg"].get("V") != BYTES or checkpoint["tokenizer_model"] is not None:
        return False
    meta = _settings_meta(checkpoint)
    return architecture_of(checkpoint["model_state"]) == V1 if meta is None else meta.get("tokenizer_sha256") is None


def _settings_meta(checkpoint: Checkpoint) -> dict[str, Any] | None:
    meta = checkpoint["train_cfg"].get("_settings_meta")
    return meta if isinstance(meta, dict) else None


def _recorded_settings(checkpoint: Checkpoint, path: Path) -> Iterator[dict[str, Any]]:
    """Settings trees, surest first: those inside the file cannot belong to other weights, a sidecar could."""
    inside = (checkpoint["resume"] or {}).get("settings")
    if isinstance(inside, dict):
        yield inside
    if sidecar_path(path).is_file():
        beside = files.read_json(sidecar_path(path))
        if isinstance(beside, dict) and isinstance(beside.get("settings"), dict):
            yield beside["settings"]


def _parse(recorded: list[dict[str, Any]]) -> Settings | None:
    for tree in recorded:
        try:
            return Settings.model_validate(tree)
        except ValueError:  # pydantic's own error is one: an older or newer schema
            continue
    return None


def _subword_tokenizer(
    checkpoint: Checkpoint,
    path: Path,
    recorded: list[dict[str, Any]],
    tokenizer_path: str | Path | None,
    ignore_hash: bool,
) -> SentencePieceTokenizer:
    embedded = checkpoint["tokenizer_model"]
    content = None if embedded is None else embedded.numpy().tobytes()
    expected = (_settings_meta(checkpoint) or {}).get("tokenizer_sha256")
    if expected is None and content is not None:
        expected = files.sha256_bytes(content)
    if tokenizer_path is None and content is not None:
        tokenizer, where = SentencePieceTokenizer.from_bytes(content), f"the one inside {path}"
    else:
        file = Path(tokenizer_path) if tokenizer_path is not None else _named_tokenizer(recorded)
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


def _named_tokenizer(recorded: list[dict[str, Any]]) -> Path:
    """The tokenizer file that the recorded settings name and that is here, else the default."""
    for tree in recorded:
        section = tree.get("tokenizer")
        name = section.get("model_path") if isinstance(section, dict) else None
        if isinstance(name, str) and Path(name).is_file():
            return Path(name)
    return Path(DEFAULT_TOKENIZER_PATH)


def _check_vocabulary(tokenizer: Tokenizer, V: int) -> None:
    beyond = {name: number for name, number in tokenizer.special_token_ids().items() if number >= V}
    if beyond:
        raise ValueError(f"the model has {V} ids, but the tokenizer's special tokens lie beyond them: {beyond}")
    if tokenizer.vocab_size > V:
        print(f"warning: the tokenizer has {tokenizer.vocab_size} ids, the model only {V}", file=sys.stderr)
