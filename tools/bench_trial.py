"""Time the training step at one setting, in this process: one line of JSON.

python tools/bench_trial.py --trial_json trial.json
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.bench.trial_cli import main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
