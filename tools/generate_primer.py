"""Generate extra primer dialogues from public facts and sentence parts.

    python tools/generate_primer.py --out data/primer.generated.txt --seed 0 --n-per-category 30 --shuffle

Reads `data/public_facts.json` and combines it with `tools/primer_combinators.py`: seven categories of
`--n-per-category` dialogues each, in the format of `data/primer.txt`. The same arguments write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
for _folder in (REPO_ROOT, REPO_ROOT / "tools"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from primer_combinators import CATEGORIES, Topic, generate_dialogues  # noqa: E402

from niels_gpt.data.primer import write_primer_txt  # noqa: E402

DEFAULT_FACTS = REPO_ROOT / "data" / "public_facts.json"
DEFAULT_OUT = REPO_ROOT / "data" / "primer.generated.txt"


def load_facts(path: Path) -> dict[str, list[Topic]]:
    """Read and check the facts file: a list of `{"topic", "fact"}` objects for every key, with `path` too in `nav`.

    Raises:
        FileNotFoundError: there is no such file; the text says where the shipped one is.
        ValueError: the file is not UTF-8 JSON of that shape; the text names the key and the entry.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such facts file; the shipped one is data/public_facts.json (use --facts)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid UTF-8 JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected a JSON object")
    for key in (category.facts_key for category in CATEGORIES if category.facts_key):
        topics = facts.get(key)
        if not isinstance(topics, list) or not topics:
            raise ValueError(f"{path}: {key!r} must be a list with at least one entry")
        needed = ("topic", "fact", "path") if key == "nav" else ("topic", "fact")
        for index, topic in enumerate(topics):
            if not isinstance(topic, dict) or not all(isinstance(topic.get(name), str) for name in needed):
                raise ValueError(f"{path}: {key}[{index}] must be an object with the texts {', '.join(needed)}")
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the file; return 0, or 1 after a one-line error."""
    parser = argparse.ArgumentParser(description="Generate extra primer dialogues from public facts.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="file to write (%(default)s)")
    parser.add_argument("--facts", type=Path, default=DEFAULT_FACTS, help="public facts to use (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (%(default)s)")
    parser.add_argument("--n-per-category", type=int, default=30, help="dialogues per category (%(default)s)")
    parser.add_argument("--shuffle", action="store_true", help="mix the categories")
    args = parser.parse_args(argv)
    if args.n_per_category < 1:
        parser.error("--n-per-category must be at least 1")
    try:
        dialogues = generate_dialogues(
            load_facts(args.facts), seed=args.seed, n_per_category=args.n_per_category, shuffle=args.shuffle
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_primer_txt(args.out, dialogues)
    except (OSError, ValueError) as error:
        print(f"generate_primer: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(dialogues)} dialogues to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
