"""Primer recall: which questions are asked, what counts as right, and that the figure is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from niels_gpt.chat_format import chat_format_for
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data.types import Chat
from niels_gpt.recall import (
    first_questions,
    held_out_questions,
    measure_recall,
    normalized,
    trained_questions,
)
from niels_gpt.settings import default_settings
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.varied import varied_model

ROOT = Path(__file__).resolve().parents[1]


def chat(*turns: str, system: str = "") -> Chat:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return Chat.from_dicts(messages, "primer")


@pytest.mark.parametrize(
    ("a", "b"), [("What's  UP?", "whats up"), ("7 + 5 = ?", "7 + 5"), ("My name is niels.", "my name is niels")]
)
def test_what_counts_as_the_same(a: str, b: str) -> None:
    assert normalized(a) == normalized(b)


def test_signs_are_part_of_a_sum() -> None:
    assert len({normalized(t) for t in ("7 + 5", "7 - 5", "7 5")}) == 3


def test_one_question_with_all_its_accepted_answers() -> None:
    found = first_questions(
        [chat("Hi!", "Hello."), chat("hi", "Hey there.", "bye", "Bye."), chat("HI", "Hello.", system="Be kind.")]
    )
    assert found == {"Hi!": ["Hello.", "Hey there."]}


def test_trained_questions_leave_validation_dialogues_out() -> None:
    settings = default_settings()
    everything = trained_questions(settings.model_copy(update={"data": _with_val(settings, 0.0)}))
    some = trained_questions(settings.model_copy(update={"data": _with_val(settings, 0.5)}))
    assert len(some) < len(everything) and len(everything) > 400


def _with_val(settings, val_frac: float):
    return settings.data.model_copy(update={"primer": settings.data.primer.model_copy(update={"val_frac": val_frac})})


def test_held_out_paraphrases_are_sixty_and_unseen() -> None:
    held_out = held_out_questions(ROOT / "data/primer_heldout.jsonl")
    seen = {normalized(question) for question in trained_questions(default_settings())}
    assert len(held_out) == 60 and not {normalized(q) for q in held_out} & seen


def test_a_model_is_right_exactly_where_its_reply_is_accepted(tiny_tokenizer: SentencePieceTokenizer) -> None:
    model = varied_model(V=tiny_tokenizer.vocab_size, T=96)
    loaded = LoadedModel(model, tiny_tokenizer, chat_format_for(tiny_tokenizer), None, Path("x.pt"), 0)
    questions = {"hi": [""], "who are you?": [""], "what is 3 plus 4?": [""]}
    first = measure_recall(loaded, questions, system="")
    replies = dict(first.wrong)
    assert first.asked == 3 and first.share == first.right / 3 and len(set(replies.values())) > 1
    accepted = {q: [replies[q].upper(), "other"] for q in list(replies)[:1]} | {q: ["no"] for q in list(replies)[1:]}
    again = measure_recall(loaded, accepted, system="")
    assert again.right == 1 and again.asked == len(replies)
    torch.nn.init.zeros_(model.ln_f.weight)  # a model that always says id 0: nothing is right
    assert measure_recall(loaded, accepted, system="").right == 0
