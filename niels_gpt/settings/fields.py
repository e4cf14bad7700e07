"""What settings are made of: a knob with its default, bounds and line of help, and the types that several share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StringConstraints

MANY = 2**31 - 1  # a bound that only stops nonsense
MAX_INT64 = 2**63 - 1
MIX_TOLERANCE = 1e-6
MAX_VOCAB_SIZE = 65535  # ids are cached as uint16
MAX_ID = MAX_VOCAB_SIZE - 1

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
FilePath = Annotated[Text, BeforeValidator(lambda v: os.fspath(v) if isinstance(v, Path) else v)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_ID)], ...], Strict(False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=MANY)], ...], Strict(False)]
Texts = Annotated[tuple[Text, ...], Strict(False)]
Mix = dict[str, float]


def knob(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its default, its line of help, and pydantic bounds (ge, gt, le, lt, pattern, ...)."""
    return Field(default=default, description=help, **bounds)


def section(kind: type[Section], help: str) -> Any:
    """A nested group of knobs."""
    return Field(default_factory=kind, description=help)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
