"""The small-talk source: split by prompt, turns cleaned, roles strictly alternating."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.data import chitchat
from niels_gpt.data.registry import forget_text
from niels_gpt.settings import Settings, validate_overrides


def group(sender: str, *texts: str) -> list[dict[str, str]]:
    return [{"text": text, "timestamp": "2018-05-02T19:38:15Z", "sender": sender} for text in texts]


def dialogue(*turns: list[dict[str, str]], prompt: str | None = "p0") -> dict[str, Any]:
    made: dict[str, Any] = {"messages": list(turns), "ratings": {}, "start": ""}
    return made if prompt is None else {**made, "prompt": prompt}


def chosen(**data: Any) -> Settings:
    return validate_overrides({"data": {"chitchat": {"val_prompts": 1, **data}}})


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes dialogues the content of the package."""

    def fill(*dialogues: dict[str, Any]) -> None:
        (tmp_path / "dataset.json").write_text(json.dumps({str(i): d for i, d in enumerate(dialogues)}))
        monkeypatch.setattr(chitchat, "_dataset_path", lambda: tmp_path / "dataset.json")
        monkeypatch.setattr(chitchat, "val_prompts", lambda prompts, settings: {"held out"})

    return fill


def test_turns_are_joined_cleaned_and_counted(dataset: Any) -> None:
    dataset(
        dialogue(group("a", "Hello ", " how\tare\n you? "), group("b", " ", ""), group("b", "fine")),
        dialogue(group("a", "nobody answers")),
        dialogue(group("a", "nobody"), group("b", "")),
    )
    assert [d.text for d in chitchat.documents(chosen(), "train")] == ["Hello how are you?\nfine"]


def test_chats_alternate_from_user_to_assistant(dataset: Any) -> None:
    four = [group("ab"[i % 2], f"turn {i}") for i in range(4)]
    dataset(
        dialogue(*four),
        dialogue(*four, group("a", "unanswered")),
        dialogue(*four[:3]),
        dialogue(*four, group("b", "and again")),
        dialogue(*four, group("c", "a third one"), group("b", "hm")),
        dialogue(*[group("a", f"to myself {i}") for i in range(6)]),
    )
    chats = list(chitchat.chats(chosen(), "train"))
    assert len(chats) == 2
    for chat in chats:
        assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
        assert [m.content for m in chat.messages] == [f"turn {i}" for i in range(4)]
    assert len(list(chitchat.documents(chosen(), "train"))) == 6


def test_a_long_dialogue_becomes_several_chats(dataset: Any) -> None:
    dataset(dialogue(*[group("ab"[i % 2], f"turn {i}") for i in range(11)]))
    chats = list(chitchat.chats(chosen(max_turns=5), "train"))
    assert [[m.content for m in chat.messages] for chat in chats] == [
        ["turn 0", "turn 1", "turn 2", "turn 3"],
        ["turn 4", "turn 5", "turn 6", "turn 7"],
        ["turn 8", "turn 9"],
    ]
    assert all(chat.messages[0].role == "user" and chat.messages[-1].role == "assistant" for chat in chats)


def test_no_dialogue_of_a_validation_prompt_is_in_train(dataset: Any) -> None:
    turns = [group("a", "x"), group("b", "y")]
    dataset(
        dialogue(*turns, prompt="held out"),
        dialogue(*turns, prompt="other"),
        dialogue(*turns, prompt=None),
        dialogue(*turns, prompt="held out"),
    )
    assert [len(list(chitchat.documents(chosen(), split))) for split in ("train", "val")] == [2, 2]


def test_validation_prompts_depend_on_the_seed_alone() -> None:
    prompts = {f"prompt {i}" for i in range(20)} | {""}
    picks = [
        chitchat.val_prompts(set(given), chosen(val_prompts=4)) for given in (prompts, sorted(prompts, reverse=True))
    ]
    assert picks[0] == picks[1] and len(picks[0]) == 4 and picks[0] < prompts
    assert chitchat.val_prompts(prompts, chosen(val_prompts=4, split_seed=1)) != picks[0]
    assert chitchat.val_prompts(prompts, chosen(val_prompts=0)) == set()
    with pytest.raises(ValueError, match=r"data\.chitchat\.val_prompts is 21, but there are only 21 prompts"):
        chitchat.val_prompts(prompts, chosen(val_prompts=21))


def test_a_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    with pytest.raises(ValueError, match="pip install chitchat-dataset"):
        list(chitchat.documents(chosen(), "train"))
    with pytest.raises(ValueError, match="pip install chitchat-dataset"):
        chitchat.describe(chosen(), "sft")


def test_the_package_itself() -> None:
    pytest.importorskip("chitchat_dataset")
    settings = validate_overrides({})
    counts = {}
    for split in ("train", "val"):
        chats = list(chitchat.chats(settings, split))
        counts[split] = len(chats)
        for chat in chats:
            roles = [m.role for m in chat.messages]
            assert 2 <= len(roles) <= 8 and roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(m.content and m.content == " ".join(m.content.split()) for m in chat.messages)
    assert counts == {"train": 15533, "val": 2162}
    about = chitchat.describe(settings, "pretrain")
    assert about["dataset_version"] == "0.9.0" and len(about["files"]["dataset.json"]) == 64


def test_what_was_read_is_kept_until_it_is_to_be_forgotten(dataset: Any) -> None:
    dataset(dialogue(group("A", "hi"), group("B", "hello")))
    assert list(chitchat.documents(chosen(), "train"))
    assert chitchat._read.cache_info().currsize == 1
    forget_text()
    assert chitchat._read.cache_info().currsize == 0
