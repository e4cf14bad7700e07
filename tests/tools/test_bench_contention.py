"""The benchmark of training beside a busy program, at a size of a second."""

from __future__ import annotations

import re
import sys

import pytest

from niels_gpt import contention
from tools import bench_contention


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long threads wait")
def test_it_compares_both_ways_with_and_without_a_busy_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"V": 512, "T": 16, "C": 16, "L": 1, "H": 2, "d_ff": 32, "B": 2}
    monkeypatch.setitem(bench_contention.SHAPES, "quickstart", small)
    monkeypatch.setattr(contention, "INTERVAL", 0.02)
    assert bench_contention.main(["--rounds", "1", "--seconds", "0.05"]) == 0
    said = capsys.readouterr().out
    for busy in (0, 1):
        for way in ("without", "with"):
            assert re.search(
                rf"^{busy} busy programs, {way} it: [\d,]{{2,}} tokens/s, waited \d+%$", said, re.MULTILINE
            )
        assert re.search(rf"^{busy} busy programs: x\d+\.\d\d$", said, re.MULTILINE)


def test_another_system_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(contention, "seconds_waited", lambda: None)
    assert bench_contention.main([]) == 1 and "does not say how long threads wait" in capsys.readouterr().err
