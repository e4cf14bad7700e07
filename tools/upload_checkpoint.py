"""Publish a checkpoint on the Hugging Face hub, with a model card.

python tools/upload_checkpoint.py --checkpoint checkpoints/best.pt --repo OWNER/NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:
    sys.path.insert(0, str(REPO_ROOT))

from niels_gpt.hub.upload import main  # noqa: E402  (a bare checkout needs the path above)

if __name__ == "__main__":
    raise SystemExit(main())
