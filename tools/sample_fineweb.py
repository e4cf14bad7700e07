"""Write a sample of FineWeb-Edu to a text file.

python tools/sample_fineweb.py --out data/fineweb_sample_20mb.txt --bytes 20000000
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.tokenizer.sample import sample_fineweb as main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
