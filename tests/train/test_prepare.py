"""What is made before training's clock starts."""

from __future__ import annotations

import pytest
from rich.console import Console

from niels_gpt.settings import validate_overrides
from niels_gpt.train import prepare


@pytest.mark.parametrize(("wanted", "device", "built"), [(True, "cpu", 2), (False, "cpu", 0)])
def test_kernels_are_compiled_where_they_will_be_used(
    wanted: bool, device: str, built: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(prepare.native, "missing", lambda: calls.append("training"))
    monkeypatch.setattr(prepare.decoder, "missing", lambda: calls.append("decoding"))
    settings = validate_overrides({"training": {"native_kernels": wanted}})
    prepare.compile_kernels(settings, device, Console(quiet=True))
    assert len(calls) == built
