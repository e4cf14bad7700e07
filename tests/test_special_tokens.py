"""The sentinels and the guard that finds them in text."""

import json

import pytest

from niels_gpt.special_tokens import (
    ASST_TOKEN,
    EOT_TOKEN,
    SPECIAL_TOKEN_IDS,
    SPECIAL_TOKEN_NAMES,
    SPECIAL_TOKENS,
    SYS_TOKEN,
    USR_TOKEN,
    assert_no_special_collision,
    find_special_collision,
)
from tests.reference import BUNDLE, needs_bundle

ALL = (SYS_TOKEN, USR_TOKEN, ASST_TOKEN, EOT_TOKEN)


def test_the_four_literals():
    assert USR_TOKEN == "<|ngpt_usr_84a5023f67d74cf29cc4001becde983c|>"
    assert tuple(SPECIAL_TOKENS) == SPECIAL_TOKEN_NAMES == tuple(SPECIAL_TOKEN_IDS) == ("sys", "usr", "asst", "eot")
    assert tuple(SPECIAL_TOKENS.values()) == ALL and len(set(ALL)) == 4


def test_where_a_literal_is():
    assert find_special_collision(f"héllo {USR_TOKEN} tail\n") == {
        "token": USR_TOKEN,
        "char_offset": 6,
        "byte_offset": 7,
        "snippet": f"{USR_TOKEN} tail\\n",
    }


@needs_bundle
def test_published_collision():
    vector = json.loads((BUNDLE / "v2/collision.json").read_text(encoding="utf-8"))
    assert find_special_collision(vector["text"]) == vector["result"]


@pytest.mark.parametrize("token", ALL)
def test_the_first_of_several_is_reported(token):
    others = "".join(t for t in ALL if t != token)
    found = find_special_collision(f"🦉{token}{others}")
    assert found is not None
    assert (found["token"], found["char_offset"], found["byte_offset"]) == (token, 1, 4)


def test_a_lone_surrogate_does_not_stop_the_search():
    found = find_special_collision(f"\ud800{EOT_TOKEN}")
    assert found is not None and found["byte_offset"] == 3
    assert find_special_collision("\ud800") is None


def test_snippets_are_ascii_on_one_line_and_short():
    found = find_special_collision(SYS_TOKEN + "\n\té\u2028🦉" * 30)
    assert found is not None
    assert len(found["snippet"]) == 80 and found["snippet"].isascii() and found["snippet"].isprintable()


@pytest.mark.parametrize("text", ["", "<|ngpt_usr_|>", USR_TOKEN[:-1], USR_TOKEN.upper(), USR_TOKEN.replace("_", "\n")])
def test_ordinary_text_passes(text):
    assert find_special_collision(text) is None
    assert_no_special_collision(text, dataset="d", doc_index=0, field="text")


def test_the_error_names_the_document():
    with pytest.raises(ValueError, match=r"^special token literal detected") as caught:
        assert_no_special_collision(f"ab{EOT_TOKEN}", dataset="roam", doc_index=12, field="text")
    for part in ("dataset=roam", "doc_index=12", "field=text", f"token={EOT_TOKEN}", "byte_offset=2", "snippet="):
        assert part in str(caught.value)
