"""Names and layouts: there and back gives the same bits, and what no plain architecture computes is refused."""

import pytest
import torch

from niels_gpt.config import Architecture
from niels_gpt.export import names
from tests.export.models import ARCHITECTURES, varied


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_there_and_back(kind):
    model = varied(ARCHITECTURES[kind], 33, T=8)
    there = names.to_hf(model.state_dict(), model.cfg, model.arch)
    assert all(tensor.is_contiguous() for tensor in there.values())
    back = names.from_hf(there, model.cfg, model.arch)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_halves_are_even_rows_then_odd_rows_of_each_head():
    assert names.halves(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert names.pairs(names.halves(torch.arange(24), 3), 3).tolist() == list(range(24))


@pytest.mark.parametrize(
    "arch",
    [
        Architecture("rmsnorm", "swiglu", mlp_bias=True, qk_norm=True),
        Architecture("layernorm", "swiglu", mlp_bias=True, qk_norm=False),
        Architecture("rmsnorm", "gelu", mlp_bias=True, qk_norm=False),
        Architecture("layernorm", "gelu", mlp_bias=True, qk_norm=True),
    ],
)
def test_what_no_plain_architecture_computes(arch):
    with pytest.raises(ValueError, match="no plain architecture computes"):
        names.architecture_for(arch)
