"""Train a tokenizer on files, sources and samples of the hub.

python scripts/train_tokenizer.py --input_glob "data/**/*.txt" --out_dir artifacts/tokenizer/v2 --vocab_size 16000
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.tokenizer.train_cli import main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
