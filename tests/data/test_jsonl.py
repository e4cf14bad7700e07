"""jsonl: three forms of chats, recognised and reported; and 5,000 bad lines, of which none is lost uncounted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.cache.sft import build_sft
from niels_gpt.data import jsonl
from niels_gpt.data.primer import iter_chat_jsonl_lenient
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import SentencePieceTokenizer

GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def settings_for(path: Path, **chosen: Any) -> Settings:
    return validate_overrides({"data": {"jsonl": {"path": str(path), **chosen}}})


def write(path: Path, *examples: object) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def read(settings: Settings) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in chat.messages] for chat in jsonl.chats(settings, "all")]


def test_three_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    path = write(
        tmp_path / "mine.jsonl",
        {**GOOD, "id": 7},
        {"conversations": turns},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "wave", "input": "", "output": "o/", "system": "kind"},
        {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]},
    )
    assert read(settings_for(path)) == [
        [("user", "hi"), ("assistant", "hello")],
        [("system", "be"), ("user", "hi"), ("assistant", "yo")],
        [("user", "add\n\n1 2"), ("assistant", "3")],
        [("system", "kind"), ("user", "wave"), ("assistant", "o/")],
        [("user", "a"), ("assistant", "b")],
    ]
    said = capsys.readouterr().err
    assert "5 lines; 1 of the form conversations; 2 of the form instruction; 2 of the form messages" in said
    about = jsonl.describe(settings_for(path), "sft")
    assert about["forms"] == {"conversations": 1, "instruction": 2, "messages": 2} and about["dropped_lines"] == {}


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"text": "a"}, "none of the keys messages, conversations, or instruction and output: found 'text'"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"messages\[0\]: role must be one of .*, found 'robot'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"messages\[0\]: content must be a string, found null"),
        ({"conversations": {}}, "'messages' must be a list, found an object"),
        ({"messages": [{"from": "gpt", "value": "a"}]}, "must have exactly the keys"),
        ({"instruction": "a", "output": " "}, "instruction or output is blank"),
        ({"instruction": "a", "output": ["b"]}, "output must be a string, found a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ([GOOD], "expected a JSON object"),
        ({"instruction": "a", "output": f"b {SPECIAL_TOKENS['eot']}"}, r"messages\[1\] spells a special token"),
    ],
)
def test_bad_lines_stop_or_are_counted(
    example: object, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, example, GOOD)
    with pytest.raises(ValueError, match=rf"mine\.jsonl: line 2: .*{reason}.*set data\.jsonl\.skip_bad"):
        read(settings_for(path))
    assert len(read(settings_for(path, skip_bad=True))) == 2
    said = capsys.readouterr().err
    assert "3 lines; 2 of the form messages; 1 dropped, " in said and "mine.jsonl: line 2)" in said
    assert sum(jsonl.describe(settings_for(path), "sft")["dropped_lines"].values()) == 1


def test_folders_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", GOOD, GOOD)
    write(tmp_path / "a.jsonl", {"instruction": "x", "output": "y"})
    assert [chat[0][1] for chat in read(settings_for(tmp_path))] == ["x", "hi", "hi"]
    assert set(jsonl.describe(settings_for(tmp_path), "sft")["files"]) == {"a.jsonl", "b.jsonl"}
    with pytest.raises(FileNotFoundError, match=r"no chat file .*none; set data\.jsonl\.path"):
        read(settings_for(tmp_path / "none"))


def test_a_cache_is_built_from_any_form(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    path = write(tmp_path / "mine.jsonl", *[GOOD, {"instruction": "add", "output": "3"}] * 10, {"text": "no chat"})
    settings = settings_for(path, skip_bad=True)
    meta = build_sft(settings, tiny_tokenizer, "jsonl", root=tmp_path)
    assert (meta["train_examples"], meta["val_examples"]) == (18, 2)
    assert meta["forms"] == {"messages": 10, "instruction": 10} and sum(meta["dropped_lines"].values()) == 1


def test_a_chat_that_no_cache_may_hold_is_out_before_the_split(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of eleven lines is bad, one of the ten others is for validation, and the line is named."""
    for bad in range(11):
        lines = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(11)]
        lines[bad]["output"] += SPECIAL_TOKENS["usr"]
        path = write(tmp_path / "mine.jsonl", *lines)
        meta = build_sft(settings_for(path, skip_bad=True), tiny_tokenizer, "jsonl", root=tmp_path, strict=False)
        assert (meta["train_examples"], meta["val_examples"]) == (9, 1)
        said = capsys.readouterr().err
        assert f"1 dropped, a message spells a special token ({path}: line {bad + 1})" in said and "warning" not in said
    with pytest.raises(ValueError, match=rf"mine\.jsonl: line {bad + 1}: messages\[1\] spells a special token"):
        build_sft(settings_for(path), tiny_tokenizer, "jsonl", root=tmp_path / "strict")


def test_no_conversation_at_all_says_what_the_lines_are(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"caf\xe9\n{}\n")
    with pytest.raises(ValueError, match=r"no conversation to train on: 2 lines; .*1 dropped, not UTF-8 .*line 1\)"):
        build_sft(settings_for(path, skip_bad=True), tiny_tokenizer, "jsonl", root=tmp_path, strict=False)


# Fuzz

TEXTS = ("hi", "", " ", "a\x00b", "\u2028", "naïve 🙂", "x" * 3000, "\ufeff", "<|", "<dialogue>", "\\ud83d")
ODD_ROLES = ("", "User", "tool", "function", 3, None, [], {}, "assistant ", "\x00")


def chat(rng: random.Random) -> dict[str, Any]:
    roles = [("user", "assistant")[i % 2] for i in range(rng.randint(2, 6))]
    return {"messages": [{"role": role, "content": rng.choice(TEXTS)} for role in roles]}


def dumped(value: object, rng: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()


def good(rng: random.Random) -> bytes:
    return dumped(chat(rng), rng)


def odd_role(rng: random.Random) -> bytes:
    example = chat(rng)
    rng.choice(example["messages"])["role"] = rng.choice(ODD_ROLES)
    return dumped(example, rng)


def unanswered(rng: random.Random) -> bytes:
    return dumped({"messages": [{"role": rng.choice(("user", "system")), "content": rng.choice(TEXTS)}]}, rng)


def doubled_role(rng: random.Random) -> bytes:
    return b'{"messages": [{"role": "user", "role": "assistant", "content": "a", "content": "b"}]}'


def odd_shape(rng: random.Random) -> bytes:
    shapes = ({}, [], None, 3, "text", {"messages": None}, {"messages": []}, {"messages": {}}, {"messages": [3]})
    more = ({"messages": [{"role": "user"}]}, {"messages": [{"content": "a", "role": "user", "x": 1}]}, {"message": []})
    return dumped(rng.choice((*shapes, *more)), rng)


def bad_utf8(rng: random.Random) -> bytes:
    line = bytearray(good(rng))
    line.insert(rng.randrange(len(line)), rng.choice((0xFF, 0xC0, 0x80, 0xED)))
    return bytes(line)


def lone_surrogate(rng: random.Random) -> bytes:
    return b'{"messages": [{"role": "assistant", "content": "%s"}]}' % rng.choice(
        (b"\\ud83d", b"\\udc00x", b"a\\ud800")
    )


def raw_nul(rng: random.Random) -> bytes:
    return good(rng).replace(b"content", b"con\x00tent", 1)


def cut(rng: random.Random) -> bytes:
    line = good(rng)
    return line[: rng.randrange(1, len(line))]


def flipped(rng: random.Random) -> bytes:
    line = bytearray(good(rng))
    for _ in range(rng.randint(1, 4)):
        line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


def sentinel(rng: random.Random) -> bytes:
    example = chat(rng)
    rng.choice(example["messages"])["content"] = f"say {rng.choice(list(SPECIAL_TOKENS.values()))} now"
    return dumped(example, rng)


def deep(rng: random.Random) -> bytes:
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    n = rng.choice((500, 1500, 20_000))
    return b'{"messages": ' + opening * n + b"1" + closing * n + b"}"


def odd_number(rng: random.Random) -> bytes:
    return rng.choice((b"1" * 5000, b"NaN", b"-Infinity", b"1e999", b'{"messages": [%s]}' % (b"7" * 5000)))


def blank(rng: random.Random) -> bytes:
    return rng.choice((b"", b" ", b"\t", b"\r"))


KINDS: dict[Callable[[random.Random], bytes], int] = {
    good: 30, odd_role: 8, doubled_role: 2, unanswered: 2, odd_shape: 8, bad_utf8: 8, lone_surrogate: 6, raw_nul: 4,
    cut: 8, flipped: 10, sentinel: 6, deep: 2, odd_number: 4, blank: 4,
}  # fmt: skip


def fuzzed(n: int, seed: int) -> bytes:
    """n lines, ended by LF or CRLF, after a byte order mark; one is 10 MB, one 100,000 deep, the last is cut."""
    rng = random.Random(seed)
    lines = [kind(rng) for kind in rng.choices(list(KINDS), weights=list(KINDS.values()), k=n - 4)]
    huge = {"messages": [{"role": "user", "content": "x" * 10_000_000}, {"role": "assistant", "content": "y"}]}
    lines.insert(n // 2, json.dumps(huge).encode())
    lines.insert(n // 3, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    lines.insert(n // 4, b"\xef\xbb\xbf" + good(rng))  # a byte order mark in the middle
    ended = [line + rng.choice((b"\n", b"\n", b"\r\n")) for line in lines]
    return b"\xef\xbb\xbf" + b"".join(ended) + good(rng)[:-20]


def build_lenient(path: Path, root: Path, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    primer = {"jsonl_path": str(path), "seed": 1, "t_max": 64}
    settings = validate_overrides({"data": {"primer": primer}})
    return build_sft(settings, tokenizer, "primer", root=root, strict=False)


def test_five_thousand_bad_lines(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(fuzzed(5000, seed=0))
    content = path.read_bytes()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert len(lines) == 5000
    present = [number for number, line in enumerate(lines, start=1) if line.strip()]
    kept, reasons = {}, {}
    for number, messages, reason in iter_chat_jsonl_lenient(path):
        assert (messages is None) == (reason is not None)
        if messages is None:
            reasons[number] = reason
        else:
            kept[number] = messages
    assert sorted([*kept, *reasons]) == present  # every line once, under its own number
    for number, messages in kept.items():
        assert json.loads(lines[number - 1].removeprefix(b"\xef\xbb\xbf")) == {"messages": messages}
        assert "".join(message["content"] for message in messages).encode("utf-8") is not None  # no half surrogates
    assert len(kept) > 1500 and 5000 in reasons
    assert any("nested too deeply" in reason for reason in reasons.values())

    silent = sum(reason.startswith("no assistant message") for reason in reasons.values())
    collisions = sum(any(s in m["content"] for m in c for s in SPECIAL_TOKENS.values()) for c in kept.values())
    meta = build_lenient(path, tmp_path, tiny_tokenizer)
    dropped = Counter(meta["dropped"])
    assert meta["train_examples"] + meta["val_examples"] + sum(dropped.values()) == len(present)
    assert dropped["collision"] == collisions > 100 and dropped["no_assistant"] == silent > 0
    assert dropped["malformed"] == len(reasons) - silent > 1000

    report = jsonl.Report()
    places = [place for place, _, _ in jsonl.parse_file(path, report)]
    assert places == [f"{path}: line {number}" for number in present]
    assert sum(report.forms.values()) + sum(map(len, report.dropped.values())) == report.lines == len(present)
    assert len(report.dropped) < 25 and max(map(len, report.dropped)) < 100  # kinds of reasons, not one for each line
    assert max(map(len, reasons.values())) < 400


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.soak
def test_more_bad_lines(seed: int, tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(fuzzed(20_000, seed))
    meta = build_lenient(path, tmp_path, tiny_tokenizer)
    present = sum(bool(line.strip()) for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert meta["train_examples"] + meta["val_examples"] + sum(meta["dropped"].values()) == present
