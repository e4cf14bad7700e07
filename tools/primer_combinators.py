"""Sentence parts for extra primer dialogues, and the rule that combines them.

A category is a set of question frames, a list of topics and weighted reply patterns. Frames times topics give its
prompts (30 with the shipped facts); a reply pattern fills the placeholders `{fact}` and `{path}` from the topic and
`{core}` from the sentences that keep the persona in view. Topics come from `data/public_facts.json`, except those of
`boundaries`, which have no public fact at all.

This is a library: run `python tools/generate_primer.py --help` for the program.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.data.primer import Dialogue  # noqa: E402  (a bare checkout needs the path above)

Topic = Mapping[str, str]

SYSTEM_LINES = (
    "You are niels, a small model with a public fact sheet.",
    "Answer briefly, and only from public facts.",
    "Be correct first and funny second.",
)

CORES = (
    "I am niels, and I keep it short.",
    "That is all a small model can say.",
    "Ask me more, one small question at a time.",
)

_TELL_FRAMES = (
    "tell me about {topic}",
    "what do you know about {topic}?",
    "can you say something about {topic}?",
    "I would like to hear about {topic}",
    "what about {topic}?",
    "give me one fact about {topic}",
)

_FACT_PATTERNS = ((5, "{fact}"), (2, "{fact} {core}"), (1, "In short: {fact}"))

_PRIVATE_TOPICS = (
    {"topic": "your maker's home address", "fact": "That is private, so it was never in my training text."},
    {"topic": "my neighbour's phone number", "fact": "Phone numbers are private, and I hold none."},
    {"topic": "the password of this machine", "fact": "Passwords are private, and I know none of them."},
    {"topic": "the other people who chat with you", "fact": "Every chat is separate, and I remember none of them."},
    {"topic": "tomorrow's headlines", "fact": "The future is not in my training text."},
)


@dataclass(frozen=True)
class Category:
    """One kind of question: `facts_key` names its topics in the facts file, or is None for `own_topics`."""

    name: str
    facts_key: str | None
    frames: tuple[str, ...]
    patterns: tuple[tuple[int, str], ...]
    own_topics: tuple[Topic, ...] = ()

    def topics(self, facts: Mapping[str, list[Topic]]) -> tuple[Topic, ...]:
        """The topics that fill the frames."""
        return self.own_topics if self.facts_key is None else tuple(facts[self.facts_key])


CATEGORIES = (
    Category("source", "source", _TELL_FRAMES, _FACT_PATTERNS),
    Category(
        "nav",
        "nav",
        (
            "where is {topic}?",
            "where do I find {topic}?",
            "which file holds {topic}?",
            "show me the way to {topic}",
            "I am looking for {topic}",
            "what is the path of {topic}?",
        ),
        ((4, "Look in {path}."), (3, "{fact} The path is {path}."), (1, "It is in {path}. {core}")),
    ),
    Category("projects_preview", "projects_preview", _TELL_FRAMES, _FACT_PATTERNS),
    Category(
        "skills",
        "skills",
        (
            "can you {topic}?",
            "are you able to {topic}?",
            "do you know how to {topic}?",
            "how well can you {topic}?",
            "did you learn to {topic}?",
            "is it easy for you to {topic}?",
        ),
        _FACT_PATTERNS,
    ),
    Category(
        "contact",
        "contact",
        (
            "how do I {topic}?",
            "where can I {topic}?",
            "I want to {topic}",
            "what is the best way to {topic}?",
            "can I {topic}?",
            "whom do I tell when I want to {topic}?",
        ),
        _FACT_PATTERNS,
    ),
    Category("personal", "personal", _TELL_FRAMES, _FACT_PATTERNS),
    Category(
        "boundaries",
        None,
        _TELL_FRAMES,
        ((4, "{fact}"), (2, "{fact} {core}"), (1, "I cannot say. {fact}")),
        _PRIVATE_TOPICS,
    ),
)


def category_dialogues(
    category: Category, facts: Mapping[str, list[Topic]], *, count: int, rng: random.Random
) -> list[Dialogue]:
    """Make `count` dialogues of one category.

    Prompts are drawn without replacement while they last; a larger `count` draws the rest with replacement.
    """
    prompts = [(frame, topic) for frame in category.frames for topic in category.topics(facts)]
    chosen = rng.sample(prompts, min(count, len(prompts)))
    chosen += rng.choices(prompts, k=count - len(chosen))
    weights = [weight for weight, _ in category.patterns]
    dialogues: list[Dialogue] = []
    for frame, topic in chosen:
        (_, pattern), core = rng.choices(category.patterns, weights)[0], rng.choice(CORES)
        reply = pattern.format(fact=topic["fact"], path=topic.get("path", ""), core=core)
        dialogues.append(
            [
                {"role": "system", "content": rng.choice(SYSTEM_LINES)},
                {"role": "user", "content": frame.format(topic=topic["topic"])},
                {"role": "assistant", "content": reply},
            ]
        )
    return dialogues


def generate_dialogues(
    facts: Mapping[str, list[Topic]], *, seed: int, n_per_category: int, shuffle: bool
) -> list[Dialogue]:
    """Make `n_per_category` dialogues of every category; the same arguments give the same dialogues."""
    rng = random.Random(seed)
    dialogues = [
        dialogue
        for category in CATEGORIES
        for dialogue in category_dialogues(category, facts, count=n_per_category, rng=rng)
    ]
    if shuffle:
        rng.shuffle(dialogues)
    return dialogues
