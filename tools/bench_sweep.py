"""Find out which model sizes train how fast on this machine: the same as `niels-gpt bench`

python tools/bench_sweep.py --device auto
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.bench.sweep import main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
