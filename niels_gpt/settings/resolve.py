"""From overrides to a run's settings.

Overrides are a JSON diff of the tree. Objects merge into the defaults; `data.mix_pretrain` and `data.mix_sft` replace
them. Nothing here opens a tokenizer or a cache: a tokenizer file is only hashed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from niels_gpt import files, paths
from niels_gpt.config import Architecture, ModelConfig, TrainConfig, to_dict
from niels_gpt.settings.data import TokenizerSettings
from niels_gpt.settings.errors import key_problems, one_error, reworded
from niels_gpt.settings.legacy import translate
from niels_gpt.settings.tree import PhaseSettings, Settings, model_config_of, train_config_of
from niels_gpt.unicode import valid_unicode

PHASES = ("pretrain", "sft")
PIECE_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}  # of every SentencePiece model here; -1 = none


def load_overrides(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """A JSON file's object, or a dict, as settings-shaped overrides; None = no overrides.

    A top-level text `_why` is dropped. Old config layouts are translated, with warnings on stderr.

    Raises: FileNotFoundError, or ValueError for what is no JSON object or cannot be translated.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        given: Any = dict(source)
    else:
        given = _read_object(source)
    if not isinstance(given, dict):
        raise ValueError(f'{source} must hold a JSON object such as {{"model": {{"L": 4}}}}')
    if isinstance(given.get("_why", ""), str):
        given.pop("_why", None)
    overrides, warnings = translate(given)
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return overrides


def _read_object(source: Any) -> Any:
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"overrides must be a dict or the path of a JSON file, not {type(source).__name__}")
    path = paths.find(source)
    if path is None:
        raise FileNotFoundError(f"no config file {os.fspath(source)}; see configs/ for examples")
    return files.read_json(path)


def validate_overrides(overrides: Mapping[str, Any]) -> Settings:
    """Defaults with `overrides` merged in; ValueError with one line per problem."""
    problems = key_problems(Settings, overrides)
    if problems:
        raise one_error(problems)
    try:
        return Settings.model_validate(overrides)
    except ValidationError as error:
        raise one_error(reworded(error)) from None


@dataclass(frozen=True)
class ResolvedSettings:
    """Everything one phase of one run goes by."""

    settings: Settings
    model_cfg: ModelConfig
    arch: Architecture
    train_cfg: TrainConfig
    special_token_ids: dict[str, int]  # {} for byte tokenizers
    stop_token_id: int | None  # these two for the record, whose format has them; `chat.conversation` reads the settings
    banned_token_ids: tuple[int, ...]
    phase: str
    overrides: dict[str, Any]
    overrides_source: str | None
    run_id: str
    resolved_path: Path | None  # None unless written
    tokenizer_sha256: str | None
    tokenizer_meta: dict[str, Any]
    generated_at_utc: str

    @property
    def training(self) -> PhaseSettings:
        """The settings of this phase."""
        options: PhaseSettings = getattr(self.settings.training, self.phase)
        return options

    def record(self) -> dict[str, Any]:
        """The content of resolved_settings.json, plain JSON values."""
        return {
            "run_id": self.run_id,
            "phase": self.phase,
            "generated_at_utc": self.generated_at_utc,
            "overrides_source": self.overrides_source,
            "overrides": self.overrides,
            "settings": self.settings.model_dump(mode="json"),
            "model_cfg": to_dict(self.model_cfg),
            "arch": to_dict(self.arch),
            "train_cfg": to_dict(self.train_cfg),
            "special_token_ids": self.special_token_ids,
            "stop_token_id": self.stop_token_id,
            "banned_token_ids": list(self.banned_token_ids),
            "tokenizer": {
                "model_path": self.settings.tokenizer.model_path,
                "sha256": self.tokenizer_sha256,
                "special_tokens": self.settings.tokenizer.special_tokens,
                "meta": self.tokenizer_meta,
            },
        }


def resolve_settings(
    phase: str,
    overrides: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    overrides_path: str | os.PathLike[str] | None = None,
    flags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    write_resolved: bool = False,
) -> ResolvedSettings:
    """Settings of one phase from a dict or a file of overrides; optionally recorded under `paths.RUNS_DIR/<run_id>/`.

    flags: settings-shaped values of the command line, which win over the overrides.

    Raises: FileNotFoundError for a missing file, ValueError (one line per problem) for everything else that is wrong.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r:.80}")
    if overrides is not None and overrides_path is not None:
        raise ValueError("give overrides or overrides_path, not both")
    source = overrides_path if overrides is None else overrides
    given = _with_flags(load_overrides(source), flags or {})
    settings = validate_overrides(given)
    run_id = _checked_run_id(run_id or new_run_id())
    model, tokenizer, training = settings.model, settings.tokenizer, getattr(settings.training, phase)
    ids = _special_token_ids(settings)
    resolved_path = paths.RUNS_DIR / run_id / "resolved_settings.json" if write_resolved else None
    resolved = ResolvedSettings(
        settings=settings,
        model_cfg=model_config_of(model),
        arch=Architecture(model.norm_type, model.mlp_type, model.mlp_bias, model.qk_norm),
        train_cfg=train_config_of(training),
        special_token_ids=ids,
        stop_token_id=_stop_token_id(settings, ids),
        banned_token_ids=_banned_token_ids(settings, ids),
        phase=phase,
        overrides=json.loads(json.dumps(given, default=os.fspath)),
        overrides_source=None if source is None or isinstance(source, Mapping) else valid_unicode(os.fspath(source)),
        run_id=run_id,
        resolved_path=resolved_path,
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        tokenizer_meta={**PIECE_IDS, "expected_special_token_ids": ids} if ids else {},
        generated_at_utc=datetime.now(UTC).isoformat(),
    )
    if resolved_path is not None:
        files.write_json(resolved_path, resolved.record())
    return resolved


def _with_flags(overrides: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(overrides)
    for key, value in flags.items():
        below = merged.get(key, {})
        is_section = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _with_flags(below, value) if is_section else value
    return merged


def new_run_id() -> str:
    """UTC `YYYYmmdd-HHMMSS-` and 8 random hex digits."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _checked_run_id(run_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        raise ValueError(f"run_id {run_id!r:.80} must be letters, digits, '.', '_' and '-': it names a folder")
    return run_id


def _special_token_ids(settings: Settings) -> dict[str, int]:
    """Name -> id of the sentinels, {} for bytes; warns of a vocabulary that is larger than the model's."""
    tokenizer, V = settings.tokenizer, settings.model.V
    if tokenizer.type == "byte":
        return {}
    if tokenizer.vocab_size > V:
        print(
            f"warning: tokenizer.vocab_size={tokenizer.vocab_size} is more than model.V={V}: "
            "a text with an id of V or above cannot be trained on",
            file=sys.stderr,
        )
    return tokenizer.expected_special_token_ids.model_dump()


def tokenizer_file(tokenizer: TokenizerSettings) -> Path | None:
    """The model file: `model_path` under the current directory, else beside the package; None if there is none."""
    return None if tokenizer.type == "byte" else paths.find(tokenizer.model_path)


def _tokenizer_sha256(tokenizer: TokenizerSettings) -> str | None:
    expected = tokenizer.tokenizer_sha256
    try:
        path = tokenizer_file(tokenizer)
        found = files.sha256_file(path) if path is not None else None
    except OSError as error:
        raise ValueError(f"tokenizer.model_path: cannot be read: {error.strerror}") from None
    if found is None:
        return expected
    if expected is not None and found != expected:
        raise ValueError(
            f"tokenizer hash mismatch: {path} has sha256 {found}, tokenizer.tokenizer_sha256 expects {expected}; "
            "put the right file there or correct the setting"
        )
    return found


def _stop_token_id(settings: Settings, ids: Mapping[str, int]) -> int | None:
    asked = settings.generation.stop_token_id
    return asked if asked is not None else ids.get("eot")


def _banned_token_ids(settings: Settings, ids: Mapping[str, int]) -> tuple[int, ...]:
    asked = settings.generation.banned_token_ids
    if asked is not None:
        return asked
    if not settings.sft_format.ban_role_tokens_during_generation:
        return ()
    return tuple(ids[name] for name in ("sys", "usr", "asst") if name in ids)
