"""Convert primer text to chat JSONL, which `python -m niels_gpt.cache.cli build-all` reads.

    python tools/convert_primer_txt_to_jsonl.py --input data/primer.txt --output data/primer.jsonl

Every dialogue becomes one line, in the same order. The output is replaced only when the whole input is well-formed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.data.primer import read_primer_txt, write_chat_jsonl  # noqa: E402  (a bare checkout needs the path above)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the file; return 0, or 1 after a one-line error."""
    parser = argparse.ArgumentParser(description="Convert primer text to chat JSONL.")
    parser.add_argument("--input", type=Path, default=REPO_ROOT / "data" / "primer.txt", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=REPO_ROOT / "data" / "primer.jsonl", help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        dialogues = read_primer_txt(args.input)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_chat_jsonl(args.output, dialogues)
    except (OSError, ValueError) as error:
        print(f"convert_primer_txt_to_jsonl: {error}", file=sys.stderr)
        return 1
    print(f"wrote {len(dialogues)} dialogues to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
