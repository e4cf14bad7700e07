"""A hub with a published model, and a folder to download into and publish from.

Tests that need other repositories have a `hub` of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.here import CARD, REPO, V1_FILE, Here
from tests.hub.server import Fault, LoopbackHub
from tests.hub.worker import Worker


@pytest.fixture(scope="session")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.publish(REPO, {"best.pt": V1_FILE, CARD: b"# hi"}, kind="model")
        yield running


@pytest.fixture(scope="session")
def worker(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    running = Worker(hub.url, tmp_path_factory.mktemp("hf_home"), offline=False)
    yield running
    running.close()


@pytest.fixture
def faulty(hub: LoopbackHub) -> Iterator[list[Fault]]:
    hub.requests.clear()
    hub.ranges.clear()
    yield hub.faults
    hub.faults.clear()


@pytest.fixture
def here(worker: Worker, tmp_path: Path) -> Here:
    return Here(worker, tmp_path)
