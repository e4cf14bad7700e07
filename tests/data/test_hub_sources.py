"""What the sources of the hub do without a hub: threads, chats, limits; and the reference vectors."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest

from niels_gpt.data import hub, hub_text, oasst1
from niels_gpt.data.dolly15k import to_chat
from niels_gpt.data.types import Chat, Document
from niels_gpt.settings import default_settings
from niels_gpt.settings.data import WikitextSettings
from tests.reference import BUNDLE, needs_bundle


def as_dicts(chat: Chat | oasst1.Thread) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in chat.messages]


@needs_bundle
@pytest.mark.parametrize(("vector", "most"), [("max32", 32), ("max3", 3)])
def test_reference_threads(vector: str, most: int) -> None:
    wanted = json.loads((BUNDLE / "v2/oasst1_threads.json").read_text())
    found = oasst1.threads(wanted["records"], english_only=True, max_messages=most)
    assert [
        {
            "messages": as_dicts(thread),
            "tree_id": thread.tree_id,
            "leaf_id": thread.leaf_id,
            "message_ids": list(thread.message_ids),
        }
        for thread in found
    ] == wanted[vector]


@needs_bundle
def test_reference_dolly(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads((BUNDLE / "v2/dolly_mapping.json").read_text())
    rows = wanted["rows"]
    plain = [as_dicts(to_chat(row, include_system=False)) for row in rows]
    assert plain == [example["messages"] for example in wanted["noshuffle"]]
    assert as_dicts(to_chat(rows[0], include_system=True)) == wanted["with_system_first"]
    order = list(range(len(rows)))
    random.Random(42).shuffle(order)
    assert order == wanted["shuffle_seed42_order"]


def message(name: str, parent: str | None, role: str, text: str | None = None, lang: str = "en") -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "message_tree_id": "t",
        "role": role,
        "text": name if text is None else text,
        "lang": lang,
    }


def paths(rows: list[dict[str, Any]], **options: Any) -> list[str]:
    told = {"english_only": True, "max_messages": 32, **options}
    return ["".join(m.content for m in thread.messages) for thread in oasst1.threads(rows, **told)]


def test_threads() -> None:
    rows = [
        message("a", None, "prompter"),
        message("b", "a", "assistant"),
        message("c", "a", "assistant", lang="de"),
        message("d", "c", "prompter"),
        message("e", "b", "prompter", "  "),
        message("f", "e", "assistant"),  # after a blank message, so b and f are one voice
        message("g", "b", "prompter"),
        message("h", "b", "moderator"),
    ]
    assert paths(rows) == ["abg"]
    assert paths(rows, english_only=False) == ["abg", "acd"]
    assert paths(rows, max_messages=2) == ["ab"]
    assert paths(rows, max_messages=1) == ["a"]
    assert paths([message("a", None, "prompter", None), message("x", "lost", "prompter")]) == ["a"]
    with pytest.raises(ValueError, match=r"oasst1: a row has no message_id, parent_id, .*; its columns are text"):
        paths([{"text": "hi"}])


def test_a_long_chain_needs_no_recursion() -> None:
    rows = [message("0", None, "prompter")]
    rows += [message(str(i), str(i - 1), ("prompter", "assistant")[i % 2]) for i in range(1, 5000)]
    assert len(next(iter(oasst1.threads(rows, english_only=True, max_messages=5000))).messages) == 5000


def test_limits_stop_reading() -> None:
    def endless() -> Any:
        for n in range(100):
            assert n < 10, "read on after its limit"
            yield Document("äb", "s")

    chosen = WikitextSettings(max_bytes=7)
    assert len(list(hub_text.limited(endless(), chosen))) == 3
    assert len(list(hub_text.limited(endless(), WikitextSettings(max_examples=10)))) == 10
    assert len(list(hub_text.limited(iter([Document("a", "s")]), WikitextSettings()))) == 1


def test_the_text_of_a_row() -> None:
    assert hub_text.text_of({"text": None, "content": "c", "document": "d"}, "x") == "c"
    with pytest.raises(ValueError, match="me/x: no column of text among 'text', 'title'; text or content or document"):
        hub_text.text_of({"text": 3, "title": "t"}, "me/x")


@pytest.mark.parametrize("library", ["datasets", "huggingface_hub"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(hub.HubError, match=f"squad/v2: reading it needs the package {library}; install it with: pip"):
        hub.load("squad/v2", split="train")


def test_no_test_reaches_the_real_hub() -> None:
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE forbids to connect"):
        hub.commit_of(default_settings().data.dolly.dataset_id, "no-such-revision")
