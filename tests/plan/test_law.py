"""The loss curve: what it says of less and more, its band, and that the fit finds a curve that is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from niels_gpt.plan.law import Law, Scale, effective_tokens, shipped_law
from niels_gpt.plan.recipe import Size
from tools import fit_law

S, M, L = Size(1_164_544, 524_288, 0.0), Size(2_700_000, 786_432, 0.0), Size(6_160_000, 1_048_576, 0.0)
UNIQUE = 2.94e6


def test_more_tokens_and_more_fresh_text_are_better_until_a_model_learns_by_heart() -> None:
    law = shipped_law()
    bits = [law.curve(S, tokens, unique=UNIQUE) for tokens in (5e5, 1e6, 2e6, 4e6, 8e6)]
    assert bits == sorted(bits, reverse=True)
    assert law.curve(S, 8e6, unique=1e9) < bits[-1]
    assert law.curve(L, 6e7, unique=UNIQUE) > law.curve(L, 1e7, unique=UNIQUE)
    assert law.curve(L, 1e9, unique=1e12) < law.curve(S, 1e9, unique=1e12)
    assert law.curve(L, 2e5, unique=UNIQUE) > law.curve(S, 2e5, unique=UNIQUE) - 0.02


def test_text_read_again_is_worth_less_and_never_more_than_so_much() -> None:
    assert effective_tokens(5e5, 1e6, 4.0) == 5e5
    again = [effective_tokens(n * 1e6, 1e6, 4.0) for n in (1, 2, 4, 100, 10_000)]
    assert again[0] == 1e6 and again == sorted(again) and again[1] < 2e6
    assert again[-1] == pytest.approx(5e6)


def test_the_band_is_that_of_the_fit_and_widens_beyond_it() -> None:
    law = shipped_law()
    inside = law.predict(S, 4e6, unique=UNIQUE)
    assert inside.low < inside.bpb < inside.high and inside.band == pytest.approx(math.sinh(2 * law.error))
    beyond = law.predict(S, 4 * law.tokens[1], unique=1e9)
    assert beyond.band == pytest.approx(math.sinh(2 * (law.error + 2 * law.beyond)))
    other = law.predict(S, 4e6, unique=UNIQUE, scale=Scale(1.1, 0.05))
    assert other.bpb == pytest.approx(1.1 * inside.bpb) and other.band > inside.band + 0.05


def test_the_shipped_curve_is_that_of_the_data() -> None:
    """Nobody has changed law.json by hand: each run lies where docs/law/fit.md says, within the error it claims."""
    law = shipped_law()
    points = fit_law.load_points(sorted(fit_law.LAW_DATA.glob("*.jsonl")))
    away = [abs(fit_law.residual(law, point)) for point in points]
    assert len(points) >= 15 and max(away) < 0.03
    assert math.sqrt(sum(a * a for a in away) / len(away)) <= law.error < 0.02


def test_the_fit_finds_a_curve_that_is_known() -> None:
    truth = replace(shipped_law(), E=1.35, A=130.0, a=0.45, B=150.0, b=0.42, repeats=15.0)
    noise = np.random.default_rng(0).normal(0, 0.001, 100)
    points = []
    for size in (Size(370_000, 262_144, 0.0), S, M, L):
        for tokens in (5e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 3.2e7):
            bits = truth.curve(size, tokens, unique=UNIQUE) * math.exp(noise[len(points)])
            points.append(fit_law.Point(size, tokens, UNIQUE, "chitchat", bits, ""))
    found = fit_law.fit(points)
    for size in (S, M):
        for tokens in (7e5, 3e6, 1e7):
            said = found.curve(size, tokens, unique=UNIQUE)
            assert said == pytest.approx(truth.curve(size, tokens, unique=UNIQUE), rel=0.003)


@pytest.mark.parametrize(("name", "value"), [("adam", 1.0), ("drop", 0.0)])
def test_experiments_are_no_data(name: str, value: float, tmp_path: Path) -> None:
    lines = (fit_law.LAW_DATA / "cpu.jsonl").read_text().splitlines()[:2]
    other = lines[1].replace(f'"{name}": {value}', f'"{name}": {value + 0.1}')
    (tmp_path / "runs.jsonl").write_text(lines[0] + "\n" + other + "\n")
    assert len(fit_law.load_points([tmp_path / "runs.jsonl"])) == 1


def test_too_few_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.jsonl").write_text("")
    out = tmp_path / "law.json"
    assert fit_law.main(["--data", str(tmp_path / "runs.jsonl"), "--out", str(out)]) == 1
    assert "too few" in capsys.readouterr().err and not out.exists()


def test_a_curve_without_a_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks E"):
        Law.from_dict({name: 1.0 for name in Law.__dataclass_fields__ if name != "E"})
