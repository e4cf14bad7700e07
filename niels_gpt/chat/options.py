"""How to answer: options of a chat, from the checkpoint's settings and what was asked for, and the system prompt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from niels_gpt import paths
from niels_gpt.infer.sampling import Sampling
from niels_gpt.settings import Settings, default_settings

BUILT_IN_SYSTEM = "Answer briefly and truthfully."
SYSTEM_FILE = "system_surly.txt"  # in configs/
DEFAULT_SEED = 42


@dataclass(frozen=True)
class ChatOptions:
    """How to answer."""

    system: str  # "" = no system message
    sampling: Sampling
    max_new_tokens: int
    seed: int = DEFAULT_SEED
    use_cache: bool = True
    weights: str = "fp32"
    native: bool = True


def build_options(settings: Settings | None, system: str, **overrides: Any) -> ChatOptions:
    """Options from a checkpoint's settings (the defaults where it brings none).

    overrides: the fields of `Sampling`, max_new_tokens, seed, use_cache, weights, native; None leaves a setting be.
    """
    settings = settings or default_settings()
    generation = settings.generation
    values: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "use_cache": settings.model.attention.use_kv_cache,
        "weights": generation.weights,
        "native": generation.native_decoder,
    }
    values |= {name: value for name, value in overrides.items() if value is not None}
    chosen = {f.name: values.pop(f.name) for f in fields(Sampling) if f.name in values}
    return ChatOptions(system=system, sampling=replace(Sampling.of(generation), **chosen), **values)


def system_prompt(system_file: str | None = None, system: str | None = None) -> str:
    """The first of: the file named, the text given, configs/system_surly.txt (here, else shipped), the built-in one."""
    if system_file is not None:
        return _read_text(Path(system_file))
    if system is not None:
        return system
    here = paths.CONFIG_DIR / SYSTEM_FILE
    if here.is_file():
        return _read_text(here)
    try:
        return _read_text(paths.shipped(f"configs/{SYSTEM_FILE}"))
    except FileNotFoundError:
        return BUILT_IN_SYSTEM


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no system prompt file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the system prompt file {path} is not UTF-8 text") from None
