"""Shorthands of the tests of settings: the message of an error, and a value at a dotted path."""

from __future__ import annotations

from typing import Any

import pytest

from niels_gpt.settings import resolve_settings


def problem(overrides: Any, phase: str = "pretrain") -> str:
    """The message of the ValueError that resolving raises."""
    with pytest.raises(ValueError) as caught:
        resolve_settings(phase, overrides)
    return str(caught.value)


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value
