"""How much of the primer a model knows: does its likeliest reply equal an accepted answer?"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data import primer_source
from niels_gpt.data.types import Chat, Message
from niels_gpt.files import read_json_lines
from niels_gpt.infer.batch import greedy_replies
from niels_gpt.settings import Settings

MAX_REPLY_TOKENS = 48
Questions = Mapping[str, Sequence[str]]  # question -> accepted answers


@dataclass(frozen=True)
class Recall:
    """How many questions were answered with an accepted reply, and which were not (question, reply)."""

    right: int
    asked: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def share(self) -> float:
        """Right answers over questions, 0..1; 0 if nothing was asked."""
        return self.right / self.asked if self.asked else 0.0


def normalized(text: str) -> str:
    """Lower case, no punctuation but + and -, single blanks: what counts as the same answer."""
    return " ".join(re.sub(r"[^\w+\- ]+", " ", text.lower().replace("'", "")).split())


def trained_questions(settings: Settings) -> dict[str, list[str]]:
    """The first user turn of every dialogue that training saw, with each reply the primer gives to it."""
    return first_questions(primer_source.chats(settings, "train"))


def first_questions(chats: Iterable[Chat]) -> dict[str, list[str]]:
    """First user turns, one spelling per normalized question -> the replies that follow it anywhere."""
    spelling: dict[str, str] = {}
    answers: dict[str, list[str]] = defaultdict(list)
    for chat in chats:
        user = next(i for i, message in enumerate(chat.messages) if message.role == "user")
        question, reply = chat.messages[user].content, chat.messages[user + 1].content
        key = normalized(question)
        spelling.setdefault(key, question)
        if reply not in answers[key]:
            answers[key].append(reply)
    return {spelling[key]: replies for key, replies in answers.items()}


def held_out_questions(path: str | Path) -> dict[str, list[str]]:
    """Paraphrases training never saw: JSON lines {"question": ..., "answers": [...]}."""
    return {entry["question"]: entry["answers"] for entry in read_json_lines(path)}


def measure_recall(loaded: LoadedModel, questions: Questions, *, system: str) -> Recall:
    """Compare the likeliest reply to every question with its accepted answers; system as in `likeliest_replies`."""
    wrong = []
    replies = likeliest_replies(loaded, list(questions), system=system)
    for (question, accepted), reply in zip(questions.items(), replies, strict=True):
        if normalized(reply) not in {normalized(answer) for answer in accepted}:
            wrong.append((question, reply))
    return Recall(len(questions) - len(wrong), len(questions), tuple(wrong))


def likeliest_replies(loaded: LoadedModel, questions: Sequence[str], *, system: str) -> list[str]:
    """The likeliest reply to each question alone, with this system prompt ("" = none), of MAX_REPLY_TOKENS at most.

    What `chat` says at temperature 0, but for a repetition penalty, and for the text that ends the replies
    of byte models.
    """
    chat = loaded.chat_format
    opening = [Message("system", system)] if system else []
    prompts = [
        chat.encode_prompt(
            [*opening, Message("user", question)], context=loaded.model.cfg.T, max_new_tokens=MAX_REPLY_TOKENS
        ).ids
        for question in questions
    ]
    replies = greedy_replies(
        loaded.model,
        prompts,
        max_new_tokens=MAX_REPLY_TOKENS,
        stop_ids=chat.stop_ids,
        banned_ids=chat.banned_ids,
        tokenizer=loaded.tokenizer,
    )
    return [loaded.tokenizer.decode(ids) for ids in replies]
