"""Conversations with a tiny model: what is remembered, what ends a reply, and which token gave which text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.chat import Conversation, build_options
from niels_gpt.chat import conversation as conversation_module
from niels_gpt.chat.conversation import _Tokens, stripped
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.types import Message
from niels_gpt.infer.steps import Step
from niels_gpt.settings import Settings
from tests.chat.models import REPLIES


@pytest.fixture
def loaded(chat_checkpoint: Path) -> LoadedModel:
    return load_model(chat_checkpoint, device="cpu")


def start(loaded: LoadedModel, system: str = "", **overrides: Any) -> Conversation:
    return Conversation(loaded, build_options(loaded.settings, system, temperature=0, **overrides))


def said(conversation: Conversation, text: str) -> str:
    return "".join(span.text for span in conversation.reply(text))


def test_turns_are_remembered_and_an_empty_reply_is_not(loaded: LoadedModel) -> None:
    conversation = start(loaded)
    assert said(conversation, "hi") == REPLIES["hi"]
    assert conversation.messages == [Message("user", "hi"), Message("assistant", REPLIES["hi"])]
    conversation.reset()
    assert said(conversation, "say nothing") == "" and conversation.messages == []


def test_the_system_prompt_opens_every_prompt_and_can_be_changed(loaded: LoadedModel) -> None:
    conversation = start(loaded, "be kind")
    list(conversation.reply("hi"))
    assert conversation.messages[:2] == [Message("system", "be kind"), Message("user", "hi")]
    conversation.set_system("be short")
    assert [m.content for m in conversation.messages[:2]] == ["be short", "hi"] and len(conversation.messages) == 3
    conversation.set_system("")
    assert conversation.messages[0] == Message("user", "hi")
    conversation.set_system("again")
    conversation.reset()
    assert conversation.messages == [Message("system", "again")]


@pytest.mark.parametrize(
    ("overrides", "stops", "bans"),
    [
        (None, {"eot"}, {"sys", "usr", "asst"}),
        ({"sft_format": {"ban_role_tokens_during_generation": False}}, {"sys", "usr", "asst", "eot"}, set()),
        ({"generation": {"stop_token_id": 5, "banned_token_ids": [6]}}, {"asst"}, {"eot"}),
    ],
)
def test_what_ends_a_reply_and_what_is_never_sampled(
    overrides: dict[str, object] | None,
    stops: set[str],
    bans: set[str],
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = loaded.tokenizer.special_token_ids()
    passed: dict[str, Any] = {}

    def spy(*_: object, **options: object) -> Iterator[Step]:
        passed.update(options)
        return iter(())

    monkeypatch.setattr(conversation_module, "stream_steps", spy)
    loaded = replace(loaded, settings=None if overrides is None else Settings.model_validate(overrides))
    assert said(start(loaded), "hi") == ""
    assert passed["stop_ids"] == {ids[name] for name in stops}
    assert set(passed["banned_ids"]) == {ids[name] for name in bans}


def test_an_interrupted_reply_is_remembered_as_far_as_it_went(loaded: LoadedModel) -> None:
    conversation = start(loaded)
    reply = conversation.reply("hi")
    begun = next(reply).text + next(reply).text
    reply.close()
    assert 0 < len(begun) < len(REPLIES["hi"])
    assert conversation.messages == [Message("user", "hi"), Message("assistant", begun)]


def test_half_a_surrogate_pair_from_the_keyboard_is_replaced(loaded: LoadedModel) -> None:
    conversation = start(loaded)
    said(conversation, "hi\ud800")
    assert all("\ud800" not in message.content for message in conversation.messages)


# once more


def test_another_reply_takes_the_place_of_the_last(loaded: LoadedModel) -> None:
    conversation = start(loaded)
    said(conversation, "hi")
    second = said(conversation, "hi")
    before = list(conversation.messages)
    assert second and "".join(span.text for span in conversation.again()) == second
    assert conversation.messages == before
    conversation.messages[-1] = Message("assistant", "something else")
    list(conversation.again())
    assert conversation.messages == before
    conversation.messages.pop()  # as in a file that ends with the user
    assert "".join(span.text for span in conversation.again()) == second and conversation.messages == before


def test_an_earlier_reply_is_kept_until_there_is_another(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = start(loaded)
    with pytest.raises(ValueError, match="no reply yet"):
        next(conversation.again())
    said(conversation, "hi")
    before = list(conversation.messages)
    conversation.again().close()
    assert conversation.messages == before

    def broken(*_: object, **__: object) -> Iterator[Step]:
        raise ValueError("no")

    monkeypatch.setattr(conversation_module, "stream_steps", broken)
    with pytest.raises(ValueError, match="no"):
        next(conversation.again())
    assert conversation.messages == before


# a full context


def test_the_oldest_turns_leave_and_the_system_prompt_stays(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = start(loaded, "be kind")
    turns = [Message("user", "hi"), Message("assistant", REPLIES["hi"])] * 12
    conversation.restore([Message("system", "be kind"), *turns])
    asked: list[list[int]] = []
    real = conversation_module.stream_steps

    def spy(model: Any, ids: list[int], **options: Any) -> Iterator[Step]:
        asked.append(ids)
        return real(model, ids, **options)

    monkeypatch.setattr(conversation_module, "stream_steps", spy)
    list(conversation.reply("bye"))
    text = loaded.tokenizer.decode(asked[0])
    assert text.startswith("be kind") and text.endswith("bye") and len(asked[0]) + 32 <= 64
    assert conversation.dropped >= 16 and len(asked[0]) < conversation.used <= 64
    assert conversation.messages[: len(turns) + 1] == [Message("system", "be kind"), *turns]  # for /save


@pytest.mark.parametrize(
    ("overrides", "cut"), [({}, True), ({"max_new_tokens": 9}, False), ({"use_cache": False}, False)]
)
def test_a_reply_that_fills_the_context_is_known_as_cut(
    loaded: LoadedModel, overrides: dict[str, Any], cut: bool
) -> None:
    endless = {"generation": {"banned_token_ids": sorted(loaded.chat_format.stop_ids)}}
    conversation = start(replace(loaded, settings=Settings.model_validate(endless)), **overrides)
    said(conversation, "hi")
    assert conversation.reply_was_cut is cut
    assert conversation.used == (64 if cut or not overrides.get("max_new_tokens") else conversation.used) <= 64


# which token gave which text


@given(st.lists(st.text(alphabet=" \n\tab", max_size=4), max_size=8))
def test_blanks_around_a_reply_are_not_shown(pieces: list[str]) -> None:
    assert "".join(stripped(iter(pieces))) == "".join(pieces).strip()


@given(st.lists(st.text(alphabet=" \nabé", max_size=3), min_size=1, max_size=9), st.data())
def test_every_visible_character_belongs_to_the_token_that_wrote_it(texts: list[str], data: st.DataObject) -> None:
    """Token n writes texts[n]; it is shown later, in other pieces."""
    tokens, owners, shown, held = _Tokens(), [], [], ""
    for n, text in enumerate(texts):
        tokens.wrote(Step(n, text, -1.0, 0.0, [], None))
        owners += [n] * len(text)
        cut = data.draw(st.integers(0, len(held + text)))
        visible, held = (held + text)[:cut], (held + text)[cut:]
        shown.append(visible)
    shown.append(held)
    spans = [span for piece in stripped(iter(shown)) for span in tokens.behind(piece)]
    whole = "".join(texts)
    lead = len(whole) - len(whole.lstrip())
    assert "".join(span.text for span in spans) == whole.strip()
    got = [span.steps[-1].token_id for span in spans for _ in span.text]
    assert got == owners[lead : lead + len(whole.strip())]
    assert sum(span.begins for span in spans) == len(set(got))
    silent = [n for n, text in enumerate(texts) if not text]
    for span in spans:
        assert all(step.token_id in silent for step in span.steps[:-1])
