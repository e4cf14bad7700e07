"""A vault of 60 files whose every flaw is known: what a report must say about it is in `TRUTH`."""

from __future__ import annotations

import random
from pathlib import Path

KEYS = (
    "AKIAZQ3DRTP5LW7YXN2B",
    "ghp_q7Zk2LmN8vXc4RtY6wPb1HsD3fGj5Ke9AuTo",
    "sk-proj-Zx81kLmQ04nVbT7cRy62_WsPd93hGfJ5aEuO",
)
MAIL, PHONE, CARD = "anna.k@example.org", "+49 30 901820", "4111 1111 1111 1111"
EXACT, NEAR, PLAIN = 10, 5, 37
QUOTE = (
    "It was the best of notes, it was the worst of notes, and nobody could say any more who had written which of them."
)
TRUTH = {
    "files": {"markdown": 60},
    "exact duplicate": {f"later/copy {i}.md" for i in range(EXACT)},
    "near duplicate": {f"later/near {i}.md" for i in range(NEAR)},
    "empty": {"empty.md"},
    "secrets_by_file": {
        "secret/aws.md": {"key": 1},
        "secret/github.md": {"key": 1, "e-mail": 1},
        "secret/openai.md": {"key": 1, "phone": 1, "card": 1},
    },
    "decoded": {"wide.md": "UTF-16"},
    "skipped": [{"name": "round", "reason": "link", "detail": "loops"}],
    "kept": 44,
    "sharing": 8,
}
# fmt: off
_WORDS = (
    "river", "stone", "lamp", "window", "garden", "paper", "engine", "winter", "letter", "harbour", "violin", "bread",
    "mountain", "clock", "forest", "bridge", "candle", "market", "silver", "thunder", "orchard", "meadow", "kettle",
    "ladder", "compass", "anchor", "feather", "mirror", "tunnel", "whistle", "basket", "curtain",
)
_VERBS = (
    "holds", "follows", "paints", "forgets", "carries", "measures", "hides", "lifts", "answers", "crosses", "repairs",
)
# fmt: on


def sentences(n: int, rng: random.Random) -> list[str]:
    """Sentences of words in an order that does not come twice."""
    return [
        f"The {' '.join(rng.sample(_WORDS, 2))} {rng.choice(_VERBS)} {rng.choice(_WORDS)} {rng.randrange(1000)} near "
        f"the {' '.join(rng.sample(_WORDS, 2))}."
        for _ in range(n)
    ]


def plant(root: Path) -> Path:
    """Make the vault under `root`."""
    rng = random.Random(7)
    for folder in ("daily", "later", "secret"):
        (root / folder).mkdir(parents=True)
    notes = []
    for i in range(PLAIN):
        lines = sentences(12, rng)
        if i % 5 == 0:  # eight notes quote the same passage
            lines.insert(3, QUOTE)
        notes.append(lines)
        marked = [f"- {line}" for line in lines]
        marked[1] = f"- TODO [[{rng.choice(_WORDS)}]] {lines[1]} #tag"
        text = f"---\ntags: [day, x{i}]\n---\n# Day {i}\n\n" + "\n".join(marked) + "\n"
        (root / "daily" / f"{i:02d}.md").write_text(text)
    for i in range(EXACT):
        original = (root / "daily" / f"{i + 1:02d}.md").read_text()
        (root / "later" / f"copy {i}.md").write_text(original)
    for i in range(NEAR):
        lines = list(notes[20 + i])
        lines[6] = lines[6].replace("near the", "beside some")
        (root / "later" / f"near {i}.md").write_text(f"# Day {20 + i}\n\n" + "\n".join(f"- {line}" for line in lines))
    for name, secret in zip(("aws", "github", "openai"), KEYS, strict=True):
        extra = {"github": f"\nwrite to {MAIL}", "openai": f"\ncall {PHONE} or pay with {CARD}"}.get(name, "")
        text = "\n".join(sentences(8, rng)) + f"\nThe key is {secret} and stays here.{extra}\n"
        (root / "secret" / f"{name}.md").write_text(text)
    (root / "empty.md").touch()
    (root / "wide.md").write_text("\n".join(sentences(9, rng)), encoding="utf-16")
    for i in range(3):
        (root / f"loose {i}.md").write_text("\n".join(sentences(6 + i, rng)))
    (root / "round").symlink_to(root, target_is_directory=True)
    return root
