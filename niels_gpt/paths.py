"""Where things live. Working folders are relative to the current directory; shipped data lies beside the package.

Constants are read at call time everywhere, so a test or a program may point them elsewhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKPOINT_DIR = Path("checkpoints")
RUNS_DIR = Path("runs")
CONFIG_DIR = Path("configs")

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def ensure_dirs() -> None:
    """Make checkpoints/ and configs/ (nothing else: data folders belong to their owners)."""
    CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
    CONFIG_DIR.mkdir(parents=True, exist_ok=True)


def shipped(relative: str) -> Path:
    """A file that comes with the project, such as `data/primer.txt`; FileNotFoundError says what to do."""
    path = PROJECT_ROOT / relative
    if not path.is_file():
        raise FileNotFoundError(f"{relative} is missing from this installation ({path}); run from a full checkout")
    return path


def state_dir() -> Path:
    """Where this system keeps what a program remembers for its user, such as the chat's history (not made here)."""
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or "")
        base = base if base.is_absolute() else Path.home() / ".local" / "state"
    return base / "niels-gpt"
