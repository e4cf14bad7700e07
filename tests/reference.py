"""The reference vectors beside the checkout, where they are; tests that need them skip with a message elsewhere."""

from pathlib import Path

import pytest

BUNDLE = Path(__file__).resolve().parents[2] / "shared" / "refbundle"
needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="../shared/refbundle is not here")
