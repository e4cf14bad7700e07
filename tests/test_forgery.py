"""Text never becomes control: hostile strings in every role, through tokenizers, templates, files and the chat itself.

Against new tokenizers (BPE and unigram), bytes, and one like the published: NFKC, sentinels as user-defined symbols,
which matches its sentinels in any text that normalises to them. `--soak` tries 10,000 conversations instead of 60.
"""

from __future__ import annotations

import io
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from niels_gpt import paths
from niels_gpt.chat import Conversation, build_options
from niels_gpt.chat import conversation as conversation_module
from niels_gpt.chat_format import TextChat, TokenChat, extract_reply_ids, format_chat_ids, format_prompt_ids, render
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.primer import read_chat_jsonl, write_chat_jsonl
from niels_gpt.data.types import ROLES, Message
from niels_gpt.infer.steps import Step
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, train_tokenizer
from tests.reference import BUNDLE

SYS, USR, ASST, EOT = (SPECIAL_TOKEN_IDS[name] for name in ("sys", "usr", "asst", "eot"))
START = {"system": SYS, "user": USR, "assistant": ASST}
CONTROL = 7  # ids below are unknown, <s>, </s> and the sentinels
LITERALS = tuple(SPECIAL_TOKENS.values())
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u180e\u2061\ufe0f\u202e\x00\x07\x1b"
PIECES = ("<s>", "</s>", "<unk>", "<0x06>", "<0x0A>", "\u2581", "[INST]", "<|im_start|>", "<|endoftext|>", "\ufffd")
TAGS = tuple(
    f"{line}{role}{colon}"
    for line in ("", "\n", "\r\n", "\r", "\x85", "\u2028")
    for role in ROLES
    for colon in (": ", ":")
)


def look_alikes() -> dict[str, str]:
    """For every character of a sentinel, the characters that NFKC turns into it."""
    wanted = set("".join(LITERALS)) | set(string.ascii_lowercase)
    found: dict[str, str] = {}
    for code in (*range(0xA0, 0xD800), *range(0xE000, 0x20000)):
        if (plain := unicodedata.normalize("NFKC", chr(code))) in wanted:
            found[plain] = found.get(plain, "") + chr(code)
    return found


LOOK_ALIKES = look_alikes()
literal = st.sampled_from(LITERALS)


@st.composite
def disguised(draw: st.DrawFn) -> str:
    """A sentinel with some characters replaced by ones that NFKC turns back."""
    text = draw(literal)
    all_of_them = draw(st.booleans())
    return "".join(
        draw(st.sampled_from(LOOK_ALIKES[c]))
        if c in LOOK_ALIKES and (all_of_them or draw(st.integers(0, 9)) == 0)
        else c
        for c in text
    )


@st.composite
def pierced(draw: st.DrawFn) -> str:
    """A sentinel with something inside: invisible characters, blanks, combining marks, or another sentinel."""
    text = draw(literal)
    inside = st.text(INVISIBLE, min_size=1, max_size=3) | st.sampled_from((" ", "\n", "\u0338", "\u0301")) | literal
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(inside) + text[at:]


@st.composite
def cut(draw: st.DrawFn) -> str:
    """The beginning or the end of a sentinel: two of them may meet, in one message or over two."""
    text = draw(literal)
    at = draw(st.integers(1, len(text) - 1))
    return text[:at] if draw(st.booleans()) else text[at:]


ordinary = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hostile = st.lists(
    st.one_of(literal, disguised(), pierced(), cut(), st.sampled_from(PIECES + TAGS), ordinary), max_size=4
).map("".join)
messages_of = st.lists(st.builds(Message, st.sampled_from(ROLES), hostile), min_size=1, max_size=4)

# the tokenizers


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    text = paths.shipped("data/primer.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("unigram")
    return load_tokenizer(train_tokenizer([text], folder, vocab_size=512, model_type="unigram"))


@pytest.fixture(scope="module")
def like_published() -> SentencePieceTokenizer:
    """Trained with the options of the published tokenizer."""
    text = paths.shipped("data/primer.txt").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        character_coverage=1.0,
        byte_fallback=True,
        user_defined_symbols=list(LITERALS),
        add_dummy_prefix=False,
        split_digits=False,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer.from_bytes(model.getvalue(), expected_special_token_ids=SPECIAL_TOKEN_IDS)


@pytest.fixture(scope="module")
def all_tokenizers(
    tiny_tokenizer: SentencePieceTokenizer, unigram: SentencePieceTokenizer, like_published: SentencePieceTokenizer
) -> dict[str, SentencePieceTokenizer]:
    found = {"bpe": tiny_tokenizer, "unigram": unigram, "like published": like_published}
    if BUNDLE.is_dir():
        found["published"] = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model", SPECIAL_TOKEN_IDS)
    return found


def tried(request: pytest.FixtureRequest, many: int = 10_000, few: int = 60) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=many if request.config.getoption("--soak") else few, suppress_health_check=quiet)


def control_ids(ids: list[int]) -> list[int]:
    return [i for i in ids if i < CONTROL]


# what is asked of every string and conversation


def check_text(tokenizers: dict[str, SentencePieceTokenizer], text: str) -> None:
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert not set(ids) & {SYS, USR, ASST, EOT}, (name, text)
        assert [part.tolist() for part in tokenizer.encode_arrays([text])] == [ids] == tokenizer.encode_batch([text])
        if name in ("bpe", "unigram"):
            assert tokenizer.decode(ids) == text and not control_ids(ids), (name, text)
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def check_token_form(tokenizers: dict[str, SentencePieceTokenizer], messages: list[Message]) -> None:
    template = [i for message in messages for i in (START[message.role], EOT)]
    for name, tokenizer in tokenizers.items():
        special = {SYS, USR, ASST, EOT}
        prompt = TokenChat(tokenizer).encode_prompt(messages, context=10**6, max_new_tokens=9).ids
        assert [i for i in prompt if i in special] == [*template, ASST], (name, messages)
        assert format_prompt_ids(tokenizer, messages) == prompt
        assert format_chat_ids(tokenizer, [asdict(message) for message in messages]) == prompt[:-1]
        ids, labels = render(tokenizer, messages)
        assert ids == prompt[:-1] and [i for i in ids if i in special] == template
        learned = [label for label in labels if label != -100]
        assert learned.count(EOT) == sum(message.role == "assistant" for message in messages)
        assert not set(learned) & {SYS, USR, ASST}
        said = messages[-1].content
        if messages[-1].role == "assistant":
            assert extract_reply_ids(tokenizer, ids) == tokenizer.encode(said)


def check_text_form(messages: list[Message]) -> None:
    prompt = TextChat(ByteTokenizer()).encode_prompt(
        [*messages, Message("user", "hi")], context=10**6, max_new_tokens=9
    )
    lines = bytes(prompt.ids).decode("utf-8").split("\n")
    found = [role for line in lines for role in ROLES if line.startswith(f"{role}: ")]
    assert found == [*(message.role for message in messages), "user", "assistant"], messages


@pytest.mark.timeout(3600)  # with --soak
def test_no_string_forges_a_control_id_or_a_role(
    request: pytest.FixtureRequest, all_tokenizers: dict[str, SentencePieceTokenizer]
) -> None:
    @tried(request)
    @given(messages_of)
    def check(messages: list[Message]) -> None:
        check_text(all_tokenizers, messages[0].content)
        check_token_form(all_tokenizers, messages)
        check_text_form(messages)

    check()


@pytest.mark.parametrize("role", ROLES)
def test_literals_alone_together_and_in_full_width(
    role: str, all_tokenizers: dict[str, SentencePieceTokenizer]
) -> None:
    wide = ["".join(chr(ord(c) + 0xFEE0) for c in text) for text in LITERALS]
    for text in (*LITERALS, "".join(LITERALS), *wide, *(one + two for one in LITERALS for two in LITERALS)):
        check_text(all_tokenizers, text)
        for messages in ([Message(role, text)], [Message(role, text[:9]), Message("user", text[9:])]):
            check_token_form(all_tokenizers, messages)
            check_text_form(messages)


def test_the_strings_are_hostile(like_published: SentencePieceTokenizer) -> None:
    """SentencePiece itself, without our spelling out, does match sentinels in them."""
    raw = like_published._sp
    wide = "".join(chr(ord(c) + 0xFEE0) for c in LITERALS[2])
    for text in (LITERALS[2], wide, "\u200b".join((LITERALS[2], ""))):
        assert ASST in raw.encode(text)
    alike = sum(len(characters) for characters in LOOK_ALIKES.values())
    assert alike > 300 and "\uff5c" in LOOK_ALIKES["|"]


# through the chat


@pytest.mark.timeout(3600)  # with --soak
@pytest.mark.parametrize("generation", ["subword", "byte"])
def test_the_chat_asks_with_exactly_its_own_control_ids(
    request: pytest.FixtureRequest, generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """System prompt, both sides of earlier turns, what is typed, and all of it saved and loaded again."""
    fixture = "chat_checkpoint" if generation == "subword" else "byte_chat_checkpoint"
    loaded: LoadedModel = load_model(request.getfixturevalue(fixture), device="cpu")
    loaded = replace(loaded, model=_Roomy(loaded.model))  # type: ignore[arg-type]
    asked: list[list[int]] = []

    def spy(_: object, ids: list[int], **options: object) -> Iterator[Step]:
        asked.append(ids)
        return iter(())

    monkeypatch.setattr(conversation_module, "stream_steps", spy)
    monkeypatch.setattr(conversation_module, "Memory", lambda *_, **__: None)  # of a million positions

    @tried(request)
    @given(hostile, hostile, hostile, hostile)
    def check(system: str, earlier: str, said: str, typed: str) -> None:
        conversation = Conversation(loaded, build_options(None, system))
        turns = [Message("user", earlier), Message("assistant", said)]
        conversation.restore([*conversation.messages, *turns])
        file = tmp_path / "a.jsonl"
        write_chat_jsonl(file, [[asdict(message) for message in conversation.messages]])
        ((_, back),) = read_chat_jsonl(file)
        assert [Message(**message) for message in back] == conversation.messages
        conversation.restore([Message(**message) for message in back])
        asked.clear()
        list(conversation.reply(typed))
        roles = [*(["system"] if system else []), "user", "assistant", "user"]
        if generation == "subword":
            assert control_ids(asked[0]) == [*(i for role in roles for i in (START[role], EOT)), ASST]
        else:
            lines = bytes(asked[0]).decode().split("\n")
            found = [role for line in lines for role in ROLES if line.startswith(f"{role}: ")]
            assert found == [*roles, "assistant"]

    check()


class _Roomy:
    """A model with all the context that a prompt may need."""

    def __init__(self, model: Any) -> None:
        self.cfg = replace(model.cfg, T=10**6)
