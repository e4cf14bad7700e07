"""Where things live. Working folders are relative to the current directory; shipped files lie beside or in the package.

Constants are read at call time everywhere, so a test or a program may point them elsewhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHECKPOINT_DIR = Path("checkpoints")
RUNS_DIR = Path("runs")
CONFIG_DIR = Path("configs")

_PACKAGE = Path(__file__).resolve().parent
IMPORT_ROOT = _PACKAGE.parent  # what a new interpreter needs on its path to `import niels_gpt`
# What holds the shipped configs/ and data/: the checkout, or of an installed wheel the folder that setup.py put there.
PROJECT_ROOT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE / "shipped"


def ensure_dirs() -> None:
    """Make checkpoints/ and configs/ (nothing else: data folders belong to their owners)."""
    CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
    CONFIG_DIR.mkdir(parents=True, exist_ok=True)


def shipped(relative: str) -> Path:
    """A file that comes with the project, such as `data/primer.txt`; FileNotFoundError says what to do."""
    path = PROJECT_ROOT / relative
    if not path.is_file():
        raise FileNotFoundError(f"{relative} is missing from this installation ({path}); install niels-gpt again")
    return path


def find(path: str | os.PathLike[str]) -> Path | None:
    """The file of this name under the current directory, else the one that comes with the project, else None."""
    return next((found for found in (Path(path), PROJECT_ROOT / path) if found.is_file()), None)


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
