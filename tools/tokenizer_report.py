"""How well tokenizers fit text: tokens per byte and word, fallback, top pieces, several side by side.

python tools/tokenizer_report.py --tokenizer artifacts/tokenizer/v2/spm.model --source chitchat
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.tokenizer.report import main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
