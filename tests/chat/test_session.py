"""Commands and files of a chat, with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from niels_gpt.chat import build_options, run_chat, session
from niels_gpt.chat.session import COMMANDS, Session
from niels_gpt.chat_format import as_messages
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.primer import read_chat_jsonl, write_chat_jsonl
from niels_gpt.data.types import Message
from tests.chat.models import REPLIES

Said = Callable[[], str]


@pytest.fixture
def loaded(chat_checkpoint: Path) -> LoadedModel:
    return load_model(chat_checkpoint, device="cpu")


@pytest.fixture
def chat(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(tmp_path)
    return Session(loaded, build_options(None, "", temperature=0))


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Said:
    """What was printed since the last call."""
    return lambda: capsys.readouterr().out


def test_a_line_is_answered_and_a_command_is_not(chat: Session, out: Said) -> None:
    for line in ("", "  ", " hi "):
        chat.take(line)
    assert out() == REPLIES["hi"] + "\n"
    assert [m.content for m in chat.conversation.messages] == ["hi", REPLIES["hi"]]
    chat.take("/RESET")
    assert chat.conversation.messages == [] and not chat.done
    chat.take("/exit")
    assert chat.done


def test_help_names_every_command(chat: Session, out: Said) -> None:
    chat.take("/help")
    lines = out().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line) < 110 for line in lines)


def test_unknown_commands_are_told_and_paths_are_text(chat: Session, out: Said) -> None:
    with pytest.raises(ValueError, match=r"no command /rest; did you mean /reset\? /help"):
        chat.take("/rest")
    with pytest.raises(ValueError, match=r"did you mean /inspect\?"):
        chat.take("/in")
    with pytest.raises(ValueError, match="no command /qqq; /help"):
        chat.take("/qqq what")
    assert chat.conversation.messages == []
    for line, text in (("/usr/bin what", "/usr/bin what"), ("//exit", "/exit"), ("/ 2", "/ 2")):
        chat.conversation.reset()
        chat.take(line)
        assert not chat.done and [m.content for m in chat.conversation.messages][:1] in ([text], [])
    out()


def test_the_system_prompt_is_shown_and_changed(chat: Session, out: Said) -> None:
    for line, shown in (
        ("/system", "none"),
        ("/system be  kind", "be  kind"),
        ("/system", "be  kind"),
        ("/system -", "none"),
    ):
        chat.take(line)
        assert out() == f"[system prompt: {shown}]\n"


def test_sampling_is_shown_and_changed(chat: Session, out: Said) -> None:
    for line, shown in (
        ("/temp", "temperature: 0"),
        ("/temp 0.5", "temperature: 0.5"),
        ("/topk", "top-k: 50"),
        ("/topk 0", "top-k: off"),
    ):
        chat.take(line)
        assert out() == f"[{shown}]\n"
    before = chat.conversation.options
    assert (before.sampling.temperature, before.sampling.top_k) == (0.5, 0)
    for line, message in (
        ("/temp hot", "'hot' is not a number"),
        ("/temp -1", "temperature must be"),
        ("/temp nan", "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.take(line)
    with pytest.raises(ValueError, match=r"'1\.5' is not a whole number"):
        chat.take("/topk 1.5")
    assert chat.conversation.options == before


def test_regen_gives_another_reply(chat: Session, out: Said) -> None:
    chat.take("hi")
    before = list(chat.conversation.messages)
    chat.take("/regen")
    assert out() == f"{REPLIES['hi']}\n" * 2 and chat.conversation.messages == before
    sampling = replace(chat.conversation.options.sampling, temperature=9.0, top_k=None)
    chat.conversation.options = replace(chat.conversation.options, sampling=sampling, max_new_tokens=9)
    replies = set()
    for _ in range(4):
        chat.take("/regen")
        replies.add(out())
    assert len(replies) > 1 and len(chat.conversation.messages) <= 2


# files


def test_a_conversation_survives_saving_and_loading(
    chat: Session, loaded: LoadedModel, out: Said, tmp_path: Path
) -> None:
    chat.take("/system be kind ✨")
    chat.conversation.messages += as_messages(
        [{"role": "user", "content": 'two\nlines "quoted" \u2028 \\'}, {"role": "assistant", "content": "yes\x1b"}]
    )
    chat.take("/save talk one.jsonl")
    assert out().endswith("[saved 3 messages to talk one.jsonl]\n")
    other = Session(loaded, build_options(None, "something else", temperature=0))
    other.take("/load talk one.jsonl")
    assert other.conversation.messages == chat.conversation.messages and other.conversation.system == "be kind ✨"
    assert [p.name for p in tmp_path.iterdir()] == ["talk one.jsonl"]
    other.take("hi")
    other.take("/save")  # its own file
    assert len(next(read_chat_jsonl(tmp_path / "talk one.jsonl"))[1]) == len(other.conversation.messages)
    assert len((tmp_path / "talk one.jsonl").read_bytes().splitlines()) == 1


def test_saving_without_a_name_makes_one_and_keeps_to_it(chat: Session, tmp_path: Path) -> None:
    chat.take("hi")
    chat.take("/save")
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("chat-") and file.suffix == ".jsonl"
    chat.take("/regen")
    chat.take("/save")
    assert list(tmp_path.iterdir()) == [file]


def test_a_new_conversation_is_not_saved_over_the_one_before(chat: Session, tmp_path: Path) -> None:
    chat.take("hi")
    chat.take("/save a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    chat.take("/reset")
    chat.take("bye")
    chat.take("/save")
    (other,) = set(tmp_path.iterdir()) - {tmp_path / "a.jsonl"}
    assert (tmp_path / "a.jsonl").read_bytes() == before and REPLIES["hi"] not in other.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="exists and is not of this chat"):
        chat.take("/save a.jsonl")


def test_what_cannot_be_saved_is_told_and_nothing_is_overwritten(chat: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save yet"):
        chat.take("/save a.jsonl")
    chat.take("hi")
    (tmp_path / "mine.jsonl").write_text("precious")
    for name, message in (("mine.jsonl", "exists and is not of this chat"), (".", "is a folder")):
        with pytest.raises(ValueError, match=message):
            chat.take(f"/save {name}")
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        chat.take("/save nowhere/a.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_loading_one_of_many(chat: Session, out: Said, tmp_path: Path) -> None:
    dialogues = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}] for n in range(3)]
    dialogues[2].append({"role": "user", "content": "hi"})
    write_chat_jsonl(tmp_path / "many.jsonl", dialogues)
    for line, first in (("/load many.jsonl", "q0"), ("/load many.jsonl 2", "q1"), ("/load many.jsonl 3", "q2")):
        chat.take(line)
        assert chat.conversation.messages[0] == Message("user", first)
    assert "/regen answers it" in out()
    chat.take("/save")  # never over a file that holds other conversations
    assert len(list(read_chat_jsonl(tmp_path / "many.jsonl"))) == 3
    for line, message in (("/load many.jsonl 4", "conversations 1 to 3, not 4"), ("/load", "name the file")):
        with pytest.raises(ValueError, match=message):
            chat.take(line)


def test_what_cannot_be_loaded_leaves_the_conversation(chat: Session, tmp_path: Path) -> None:
    chat.take("hi")
    before = list(chat.conversation.messages)
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "king", "content": "x"}]}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "noise.jsonl").write_bytes(bytes(range(128, 256)))
    for name, message in (("bad", "line 1: .*role must be"), ("none", "no example"), ("noise", "line 1: not UTF-8")):
        with pytest.raises(ValueError, match=message):
            chat.take(f"/load {name}.jsonl")
    with pytest.raises(FileNotFoundError, match=r"there is no file gone\.jsonl"):
        chat.take("/load gone.jsonl")
    assert chat.conversation.messages == before


# the loop


def feed(monkeypatch: pytest.MonkeyPatch, lines: list[str | type[BaseException]]) -> None:
    """Lines that come from the keyboard; an exception is raised there."""

    def read() -> str:
        line = lines.pop(0) if lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(session, "line_reader", lambda commands, history: read)


def test_errors_are_one_line_and_the_chat_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    feed(monkeypatch, ["/load gone.jsonl", "/temp x", "/save /proc/nowhere/a", "hi"])
    assert run_chat(loaded, build_options(None, "", temperature=0)) == 0
    out, err = capsys.readouterr()
    assert out == REPLIES["hi"] + "\n\n"
    assert [line[:7] for line in err.splitlines()] == ["Error: "] * 3


def test_ctrl_c_stops_a_reply_quietly_and_leaves_at_the_prompt(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, ["hi", "/reset", "bye", KeyboardInterrupt, "hi"])
    whole, count = session.Conversation.reply, 0

    def interrupted(self: session.Conversation, text: str):  # type: ignore[no-untyped-def]
        nonlocal count
        for span in whole(self, text):
            yield span
            count += 1
            if count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(session.Conversation, "reply", interrupted)
    assert run_chat(loaded, build_options(None, "", temperature=0)) == 0
    out, err = capsys.readouterr()
    first = out.partition("\n")[0]
    assert REPLIES["hi"].startswith(first) and first != REPLIES["hi"] and err == ""
    assert out.endswith(f"\n{REPLIES['bye']}\n\n") and out.count("hello") <= 1


def test_starting_from_a_file(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "wrong"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(chat))
    feed(monkeypatch, ["/regen"])
    assert run_chat(loaded, build_options(None, "", temperature=0), load=str(tmp_path / "a.jsonl")) == 0
    assert REPLIES["hi"] in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run_chat(loaded, build_options(None, "", temperature=0), load="gone.jsonl")


@pytest.mark.parametrize("of_the_file", [None, "be cruel"])
def test_a_system_prompt_that_was_asked_for_holds_for_a_loaded_conversation(
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    of_the_file: str | None,
) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    opening = [] if of_the_file is None else [{"role": "system", "content": of_the_file}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*opening, *turns]}))
    for keep, expected in ((True, "be kind"), (False, of_the_file or "none")):
        feed(monkeypatch, ["/system"])
        options = build_options(None, "be kind", temperature=0)
        assert run_chat(loaded, options, load=str(tmp_path / "a.jsonl"), keep_system=keep) == 0
        assert f"[system prompt: {expected}]" in capsys.readouterr().out
