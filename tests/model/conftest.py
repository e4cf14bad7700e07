"""What tests of the model change for the whole process, put back after each."""

from collections.abc import Iterator

import pytest
import torch

from niels_gpt.model.native import ops


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ops.switch(True)
