"""How replies look: on a terminal and through a pipe, plain and looked into, with and without colours."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from niels_gpt.chat import Conversation, Span, View, answer_once, build_options
from niels_gpt.chat.view import token_name
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.types import Message
from niels_gpt.infer.steps import Step
from niels_gpt.tokenizer import ByteTokenizer
from tests.chat.models import REPLIES

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def loaded(chat_checkpoint: Path) -> LoadedModel:
    return load_model(chat_checkpoint, device="cpu")


def be_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make View believe in a terminal with colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def spans(*parts: tuple[str, float]) -> Iterator[Span]:
    """Text and the bits of surprise of its token."""
    for n, (text, bits) in enumerate(parts):
        yield Span(text, (Step(20 + n, text, -bits * math.log(2), 1.0, [], None),), begins=True)


def shown(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], *parts: tuple[str, float], inspect: bool = False
) -> str:
    View(inspect=inspect).speak(Conversation(loaded, build_options(None, "")), spans(*parts))
    return capsys.readouterr().out


def test_control_characters_are_hidden_on_a_terminal_only(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = ("a\x1b[2J", 0.0), ("\x9bb\n\tc\u202e", 0.0)
    assert shown(loaded, capsys, *nasty) == "a\x1b[2J\x9bb\n\tc\u202e\n"


def test_a_terminal_shows_no_controls_but_the_speed_and_the_context(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_terminal(monkeypatch)
    text, meter = shown(loaded, capsys, ("a\x1b[2J", 0.0), ("\x9bb\n\tc\u202e", 0.0)).rsplit("\n", 2)[:2]
    assert text == "a\ufffd[2J\ufffdb\n\tc\ufffd"
    assert re.fullmatch(r"\[0 tokens, 0\.0 tokens/s; context ░{10} 0 of 64\]", meter)


def test_the_meter_fills_with_the_context(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_terminal(monkeypatch)
    conversation = Conversation(loaded, build_options(None, "", temperature=0))
    View().speak(conversation, conversation.reply("hi"))
    found = re.search(r"\[(\d+) tokens, [\d.]+ tokens/s; context (█*)░* (\d+) of 64\]", capsys.readouterr().out)
    assert found and int(found[1]) == len(conversation.reply_steps)
    prompt = loaded.chat_format.encode_prompt([Message("user", "hi")], context=64, max_new_tokens=9)
    assert int(found[3]) == len(prompt.ids) + int(found[1])
    assert len(found[2]) == round(10 * int(found[3]) / 64)


def test_surprise_is_a_colour_or_a_number_and_the_text_stays(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_terminal(monkeypatch)
    parts = ("Grass", 0.2), (" is", 2.0), (" very", 5.0), (" blue [bold]\n", 12.4)
    coloured = shown(loaded, capsys, *parts, inspect=True)
    assert ESCAPES.sub("", coloured).startswith("Grass is very blue [bold]\n")
    assert coloured.startswith("Grass\x1b[32m is\x1b[0m\x1b[35m very\x1b[0m\x1b[1;4;31m blue [bold]")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(loaded, capsys, *parts, inspect=True).startswith("Grass is² very⁵ blue [bold]¹²\n")


def test_the_legend_explains_both_and_comes_once(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_terminal(monkeypatch)
    view = View(inspect=True)
    view.legend()
    view.legend()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and ESCAPES.sub("", out).startswith("[surprise of each token in bits: 0 to 1, 1 to 3")
    monkeypatch.setenv("NO_COLOR", "1")
    View(inspect=True).legend()
    assert "⁷ after a token" in capsys.readouterr().out


def test_looking_into_a_reply_lists_what_else_was_likely(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = build_options(None, "", temperature=3.0, seed=5, max_new_tokens=12)
    answer_once(loaded, options, ["hi"], inspect=True)
    out = capsys.readouterr().out
    assert "<|ngpt_" not in out
    lines = [line for line in out.splitlines() if re.match(r"  +\d+\.\d bits  ", line)]
    assert 1 <= len(lines) <= 5
    bits = [float(line.split()[0]) for line in lines]
    assert bits == sorted(bits, reverse=True) and bits[0] > 1
    for line, surprised in zip(lines, bits, strict=True):
        chosen, others = line.split(" bits  ")[1].split("; else ")
        percent = float(chosen.rsplit(" ", 1)[1].rstrip("%"))
        assert abs(percent - 100 * 2**-surprised) <= 0.06 + 4 * 2**-surprised
        assert len(re.findall(r"\d%", others)) == 4 and chosen.rsplit(" ", 1)[0] not in others.split(", ")


def test_plain_and_looked_into_replies_are_the_same_text(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = build_options(None, "", temperature=0)
    answer_once(loaded, options, ["hi", "say nothing"], inspect=True)
    out, err = capsys.readouterr()
    assert REPLIES["hi"] in out and err == "(no reply)\n"  # the model is certain of every token: no numbers
    assert out.count("it was sure of every one]") == 2


def test_names_of_tokens(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.special_token_ids()
    assert [token_name(loaded.tokenizer, ids[name]) for name in ("eot", "asst")] == ["[end]", "[assistant]"]
    assert token_name(loaded.tokenizer, 999) == "[999]" and token_name(loaded.tokenizer, 0) == "[0]"
    names = [token_name(ByteTokenizer(), token_id) for token_id in (10, 34, 65, 200)]
    assert names == ['"\\n"', '"\\""', '"A"', "0xC8"]
