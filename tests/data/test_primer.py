"""The shipped primer's promises, and the readers, the splitter and the writers of `niels_gpt.data.primer`."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections import defaultdict
from pathlib import Path

import pytest

from niels_gpt.data.primer import (
    DIALOGUE_DELIMITER,
    iter_chat_jsonl_lenient,
    parse_chat_line,
    parse_dialogue,
    read_chat_jsonl,
    read_primer_txt,
    split_primer_text,
    write_chat_jsonl,
    write_primer_txt,
)

ROOT = Path(__file__).resolve().parents[2]
REFBUNDLE = ROOT.parent / "shared" / "refbundle" / "v2"

# Requests that may have several replies; every other question has one.
MULTI_ANSWERS = (
    {
        "Hello. I am niels. What would you like to know?",
        "Hi there. How can I help?",
        "Hello. It is nice to meet you.",
    },
    {"Goodbye. Come back with more questions.", "Bye. It was nice talking to you."},
    {
        "Why did the model cross the road? It was downhill for the loss.",
        "I know a joke about memory, but I forgot it.",
        "A token walks into a bar and leaves in two pieces.",
        "I had a joke about attention, but you looked away.",
        "My loss went down, and so did the laughter.",
    },
)


def normalise(text: str) -> str:
    """Lower-case, without punctuation except + and -, and with single blanks."""
    dropped = str.maketrans("", "", string.punctuation.replace("+", "").replace("-", ""))
    return " ".join(text.lower().translate(dropped).split())


@pytest.fixture(scope="module")
def dialogues() -> list[list[dict[str, str]]]:
    return read_primer_txt(ROOT / "data" / "primer.txt")


@pytest.fixture(scope="module")
def replies(dialogues: list[list[dict[str, str]]]) -> dict[str, set[str]]:
    """Normalised question -> every reply the primer gives to it."""
    found: dict[str, set[str]] = defaultdict(set)
    for messages in dialogues:
        for question, answer in itertools.pairwise(messages):
            if question["role"] == "user":
                found[normalise(question["content"])].add(answer["content"])
    return found


@pytest.fixture(scope="module")
def heldout() -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / "primer_heldout.jsonl").read_text().splitlines()]


class TestShippedPrimer:
    def test_has_many_distinct_dialogues(self, dialogues: list) -> None:
        assert len(dialogues) >= 800
        assert len({json.dumps(messages) for messages in dialogues}) == len(dialogues)

    def test_some_dialogues_have_several_turns(self, dialogues: list) -> None:
        turns = [sum(message["role"] == "user" for message in messages) for messages in dialogues]
        assert sum(count > 1 for count in turns) >= 80
        assert max(turns) <= 3

    def test_file_ends_with_one_newline(self) -> None:
        text = (ROOT / "data" / "primer.txt").read_text(encoding="utf-8")
        assert text.endswith("\n") and not text.endswith("\n\n")
        assert text.isascii()

    def test_replies_are_short(self, replies: dict) -> None:
        for question, answers in replies.items():
            assert all(3 <= len(answer.split()) <= 20 for answer in answers), question

    def test_system_lines_are_spread(self, dialogues: list) -> None:
        default = (ROOT / "configs" / "system_surly.txt").read_text(encoding="utf-8")
        assert len(default) <= 91 and default.count("\n") == 1 and default.endswith("\n")
        first = [messages[0]["content"] if messages[0]["role"] == "system" else "" for messages in dialogues]
        assert 0.3 < first.count("") / len(first) < 0.5
        assert 0.3 < first.count(default.strip()) / len(first) < 0.5

    def test_one_question_has_one_answer(self, replies: dict) -> None:
        for question, answers in replies.items():
            assert len(answers) == 1 or any(answers <= listed for listed in MULTI_ANSWERS), (question, answers)

    def test_knows_its_name(self, replies: dict) -> None:
        assert replies[normalise("what is your name?")] == {"My name is niels."}

    def test_arithmetic_is_correct(self, replies: dict) -> None:
        checked = defaultdict(int)
        for question, answers in replies.items():
            asked = [int(number) for number in re.findall(r"\d+", question)]
            if len(asked) != 2:
                continue
            (answer,) = answers
            a, b = asked[::-1] if question.startswith("take ") else asked
            minus = re.search(r"minus| - |^take ", question) is not None
            assert answer == f"It is {a - b if minus else a + b}.", question
            checked["minus" if minus else "plus"] += 1
        assert checked["plus"] >= 100 and checked["minus"] >= 40

    def test_jsonl_is_the_converted_text(self, dialogues: list) -> None:
        assert [messages for _, messages in read_chat_jsonl(ROOT / "data" / "primer.jsonl")] == dialogues


class TestHeldOut:
    def test_questions_are_sixty_and_distinct(self, heldout: list) -> None:
        assert len({normalise(item["question"]) for item in heldout}) == len(heldout) == 60

    def test_questions_are_not_trained(self, heldout: list, replies: dict) -> None:
        assert [item["question"] for item in heldout if normalise(item["question"]) in replies] == []

    def test_answers_are_trained(self, heldout: list, replies: dict) -> None:
        known = {answer for answers in replies.values() for answer in answers}
        for item in heldout:
            assert set(item) == {"question", "answers"} and item["answers"]
            assert set(item["answers"]) <= known
            assert len(item["answers"]) == 1 or set(item["answers"]) in MULTI_ANSWERS


class TestParseDialogue:
    def test_reads_roles_and_contents(self) -> None:
        assert parse_dialogue("system: s\nuser: a: b\nassistant: c", "here") == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a: b"},
            {"role": "assistant", "content": "c"},
        ]

    @pytest.mark.parametrize(
        ("block", "line", "reason"),
        [
            ("hello", 1, "must start with"),
            ("tool: x\nassistant: y", 1, "must start with"),
            ("assistant: a", 1, "expected system or user"),
            ("user: a\nuser: b", 2, "expected assistant"),
            ("user: a\nassistant: b\nsystem: c", 3, "expected user"),
            ("user: a\nassistant:", 2, "empty"),
            ("user: a\nassistant: b user: c", 2, "may not contain"),
            ("user: a\nassistant: b <|eot|>", 2, "may not contain"),
            ("user: a\n\nassistant: b", 2, "must start with"),
            ("user: a\nassistant: b\nuser: c", 3, "must end with an assistant"),
        ],
    )
    def test_names_the_place_and_the_line(self, block: str, line: int, reason: str) -> None:
        with pytest.raises(ValueError, match=f"^somewhere, line {line}: .*{reason}"):
            parse_dialogue(block, "somewhere")

    def test_file_errors_count_lines_from_the_top(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_text(DIALOGUE_DELIMITER.join(["user: a\nassistant: b", "user: c\nnonsense"]) + "\n")
        with pytest.raises(ValueError, match=r"p\.txt, dialogue 2, line 7: .*nonsense"):
            read_primer_txt(path)

    def test_file_tolerates_windows_lines_and_byte_order_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_bytes(b"\xef\xbb\xbfuser: a\r\nassistant: b\r\n\r\n<dialogue>\r\n\r\nuser: c\r\nassistant: d\r\n")
        assert [messages[0]["content"] for messages in read_primer_txt(path)] == ["a", "c"]

    @pytest.mark.parametrize(("raw", "reason"), [(b"user: a\n\xff", "line 2: not UTF-8"), (b"\n", "no dialogue")])
    def test_unusable_file(self, tmp_path: Path, raw: bytes, reason: str) -> None:
        path = tmp_path / "p.txt"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=reason):
            read_primer_txt(path)


class TestSplit:
    def test_rule(self) -> None:
        text = "|".join(f" {index} " for index in range(25)) + "|  "
        train, val = split_primer_text(text, delimiter="|", val_frac=0.1, seed=42)
        assert len(val.split("|")) == 2 and len(train.split("|")) == 23
        assert sorted(map(int, (train + "|" + val).split("|"))) == list(range(25))
        assert (train, val) == split_primer_text(text, delimiter="|", val_frac=0.1, seed=42)
        assert (train, val) != split_primer_text(text, delimiter="|", val_frac=0.1, seed=43)

    def test_small_inputs(self) -> None:
        assert split_primer_text("a", delimiter="|", val_frac=0.5, seed=0) == ("a", "")
        assert split_primer_text(" | ", delimiter="|", val_frac=0.5, seed=0) == ("", "")
        train, val = split_primer_text("a|b", delimiter="|", val_frac=0.0, seed=0)
        assert {train, val} == {"a", "b"}

    @pytest.mark.parametrize("val_frac", [-0.1, 1.0, float("nan")])
    def test_bad_fraction(self, val_frac: float) -> None:
        with pytest.raises(ValueError, match="val_frac"):
            split_primer_text("a|b", delimiter="|", val_frac=val_frac, seed=0)

    @pytest.mark.skipif(not REFBUNDLE.is_dir(), reason=f"no reference bundle at {REFBUNDLE}")
    def test_matches_the_reference(self) -> None:
        expected = json.loads((REFBUNDLE / "splits.json").read_text(encoding="utf-8"))["primer_split_seed42"]
        text = (REFBUNDLE / "corpus" / "primer.txt").read_text(encoding="utf-8")
        train, val = split_primer_text(text, delimiter=DIALOGUE_DELIMITER, val_frac=0.1, seed=42)
        assert {"train": train, "val": val} == expected


GOOD_LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'

BAD_LINES = [
    (b'{"messages": "\xff"}', "not UTF-8"),
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b"1" * 5000, "not valid JSON"),
    (b"[]", "expected a JSON object"),
    (b"{}", "missing"),
    (b'{"messages": {}}', "must be a list"),
    (b'{"messages": []}', "must not be empty"),
    (b'{"messages": ["a"]}', r"messages\[0\] must be an object"),
    (b'{"messages": [{"role": "user"}]}', "exactly the keys"),
    (b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "exactly the keys"),
    (b'{"messages": [{"role": "tool", "content": "a"}]}', "role must be one of"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "role must be one of"),
    (b'{"messages": [{"role": "user", "content": null}]}', "content must be a string"),
    (b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant"),
]


class TestChatJsonl:
    @pytest.mark.parametrize(("line", "reason"), BAD_LINES)
    def test_bad_lines_have_clear_reasons(self, line: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            parse_chat_line(line)

    def test_empty_content_is_allowed(self) -> None:
        assert parse_chat_line(b'{"messages": [{"role": "assistant", "content": ""}]}')[0]["content"] == ""

    def test_line_numbers_count_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\n" + GOOD_LINE + b"\n[]\n")
        lines = read_chat_jsonl(path)
        assert [next(lines)[0], next(lines)[0]] == [1, 3]
        with pytest.raises(ValueError, match=r"chat\.jsonl: line 4: expected a JSON object"):
            next(lines)

    def test_lenient_reading_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jsonl"
        path.write_bytes(b"\n".join([BAD_LINES[1][0], GOOD_LINE, BAD_LINES[-1][0]]))
        found = list(iter_chat_jsonl_lenient(path))
        assert [(number, messages is None) for number, messages, _ in found] == [(1, True), (2, False), (3, True)]
        assert "no assistant" in found[2][2]

    @pytest.mark.parametrize("raw", [b"", b"\n\n", b"\xef\xbb\xbf"])
    def test_empty_file(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "chat.jsonl"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="no example"):
            list(read_chat_jsonl(path))

    def test_written_files_read_back(self, tmp_path: Path) -> None:
        messages = [{"role": "user", "content": "gr\u00fc\u00df \u2028"}, {"role": "assistant", "content": "b"}]
        write_chat_jsonl(tmp_path / "chat.jsonl", [messages])
        assert list(read_chat_jsonl(tmp_path / "chat.jsonl")) == [(1, messages)]
        assert "gr\u00fc\u00df" in (tmp_path / "chat.jsonl").read_text(encoding="utf-8")
        write_primer_txt(tmp_path / "chat.txt", [parse_dialogue("user: a\nassistant: b", "here")] * 2)
        assert len(read_primer_txt(tmp_path / "chat.txt")) == 2

    def test_failed_write_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jsonl"
        path.write_text("old")
        with pytest.raises(ValueError):
            write_chat_jsonl(path, [[{"role": "assistant", "content": "\ud800"}]])
        with pytest.raises(ValueError):
            write_primer_txt(path, [[{"role": "user", "content": "two\nlines"}]])
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
