"""Every snippet of docs/walkthrough.md runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import walkthrough

NUMBER = re.compile(r"-?\d+\.\d+")
LOOSE = 0.15  # of a measured figure: other processors round otherwise, and training amplifies it


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    return walkthrough.run(walkthrough.PAGE.read_text(encoding="utf-8"), tmp_path_factory.mktemp("walk"))


def test_snippets_print_what_the_page_says(outputs: list[tuple[str, str]]) -> None:
    page = walkthrough.expected(walkthrough.PAGE.read_text(encoding="utf-8"))
    assert [code for code, _ in outputs] == [code for code, _, _ in page]
    assert sum(text is not None for _, text, _ in page) >= 10
    for (code, printed), (_, text, pattern) in zip(outputs, page, strict=True):
        if text is None:
            continue
        found, said = walkthrough.steady(walkthrough.chosen(printed, pattern)), walkthrough.steady(text)
        hint = f"after\n{code}\n(python -m tests.walkthrough writes what is printed into the page)"
        assert NUMBER.sub("#", found) == NUMBER.sub("#", said), hint
        for ours, theirs in zip(NUMBER.findall(found), NUMBER.findall(said), strict=True):
            assert float(ours) == pytest.approx(float(theirs), rel=LOOSE, abs=0.02), f"after\n{code}\n{found}"


def test_the_numbers_tell_the_story(outputs: list[tuple[str, str]]) -> None:
    """What the prose says of them, whatever the page holds: learning lowers the loss."""
    by_hand = next(printed for code, printed in outputs if "lr_at_step(step" in code)
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", by_hand)]
    assert 6.0 < losses[0] < 6.6 and losses[0] > losses[1] > losses[2] and losses[2] < 4.5
    program = next(printed for code, printed in outputs if "--phase pretrain --config walk.json" in code)
    val = [float(value) for value in re.findall(r"val_primer_loss (\d+\.\d+)", program)]
    assert len(val) >= 2 and val[-1] < val[0] < 6.2


def test_changed_pages_are_noticed(tmp_path: Path) -> None:
    page = "```python\nprint(1 + 1)\nprint('x')\n```\n\n```text \\d\n3\n```\n"
    ((_, printed),) = walkthrough.run(page, tmp_path)
    ((_, text, pattern),) = walkthrough.expected(page)
    assert (walkthrough.chosen(printed, pattern), text) == ("2\n", "3\n")
