"""Muon's matrices and the group that drives two optimizers as one."""

import copy

import pytest
import torch
from torch import nn

from niels_gpt.config import NEW, ModelConfig
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import NEWTON_SCHULZ, Muon, OptimizerGroup, _gram_is_cheaper, build_optimizer, orthogonalize
from niels_gpt.settings import default_settings


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 0, grad_seed: int = 1, parts: int | None = None) -> nn.Parameter:
    p = nn.Parameter(normal(*shape, seed=seed))
    p.grad = normal(*shape, seed=grad_seed)
    if parts is not None:
        p.muon_parts = parts  # type: ignore[attr-defined]
    return p


def muon(params: list[nn.Parameter], **changes: float) -> Muon:
    return Muon(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 16, 16), (4, 64, 16), (4, 16, 64), (1, 8, 32), (3, 1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_one_and_vectors_stay(shape, scale):
    G = normal(*shape) * scale
    X = orthogonalize(G)
    assert X.shape == G.shape and X.dtype == torch.float32
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ X @ Vh.mT  # diagonal if X has the singular vectors of G
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(values)).abs().max() < 0.02
    lifted = S / G.norm(dim=(-2, -1))[:, None] > 0.01  # five steps cannot lift what is nearly zero
    assert lifted.float().mean() > 0.9
    assert (values[lifted] > 0.6).all() and (values < 1.3).all()


def test_a_batch_is_its_matrices_one_by_one():
    G = normal(6, 12, 20)
    torch.testing.assert_close(orthogonalize(G), torch.cat([orthogonalize(g[None]) for g in G]), atol=1e-5, rtol=1e-5)


def quintic(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz as it is written in the paper, in float64."""
    a, b, c = NEWTON_SCHULZ
    X = G.double() / G.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 16, 24), (2, 16, 32), (2, 32, 96), (2, 96, 32)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_is_the_polynomial_of_the_paper_for_any_shape_and_spectrum(shape, decay):
    """Also where singular values fall by a factor of a thousand, so that float32 products hardly hold the smallest."""
    U, S, Vh = torch.linalg.svd(normal(*shape), full_matrices=False)
    G = U @ torch.diag_embed(10.0 ** -torch.linspace(0, decay, S.shape[-1]).expand_as(S)) @ Vh
    expected = quintic(G) if shape[1] <= shape[2] else quintic(G.mT).mT
    torch.testing.assert_close(orthogonalize(G).double(), expected, atol=1e-3, rtol=0)
    assert (orthogonalize(G, dtype=torch.bfloat16).double() - expected).norm() / expected.norm() < 0.2


def test_the_gram_matrix_is_used_only_where_it_is_exact_and_cheaper():
    assert _gram_is_cheaper(torch.zeros(1, 8, 16))
    assert not _gram_is_cheaper(torch.zeros(1, 8, 15))
    assert not _gram_is_cheaper(torch.zeros(1, 8, 16, dtype=torch.bfloat16))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not _gram_is_cheaper(torch.zeros(1, 8, 16))
    finally:
        torch.set_float32_matmul_precision(before)


def test_zero_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


def test_fused_parts_equal_separate_matrices():
    fused = parameter(24, 8, parts=3)
    separate = [nn.Parameter(part.detach().clone()) for part in fused.chunk(3)]
    for p, grad in zip(separate, fused.grad.chunk(3), strict=True):
        p.grad = grad.clone()
    together, apart = muon([fused], weight_decay=0.1), muon(separate, weight_decay=0.1)
    for _ in range(3):
        together.step()
        apart.step()
    torch.testing.assert_close(fused, torch.cat(separate), atol=1e-5, rtol=1e-5)
    whole = parameter(24, 8)
    muon([whole], weight_decay=0.1).step()
    assert not torch.allclose(whole, torch.cat([p[:8] for p in separate]), atol=1e-2)


def test_a_step_is_momentum_nesterov_orthogonal_and_scaled_by_shape():
    tall, wide = parameter(32, 8), parameter(8, 32)
    for p in (tall, wide):
        expected, buffer = p.detach().clone(), torch.zeros(p.shape)
        optimizer = muon([p], lr=0.5, momentum=0.8, weight_decay=0.01)
        for step in range(3):
            p.grad = normal(*p.shape, seed=10 + step)
            optimizer.step()
            buffer = 0.8 * buffer + 0.2 * p.grad
            update = 0.8 * buffer + 0.2 * p.grad
            size = 0.5 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            expected = expected * (1 - 0.5 * 0.01) - size * orthogonalize(update[None])[0]
            torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(optimizer.state[p]["momentum"], buffer)


def test_the_size_of_the_gradient_does_not_matter():
    small, large = parameter(8, 16), parameter(8, 16)
    large.grad *= 1000
    for p in (small, large):
        muon([p]).step()
    torch.testing.assert_close(small, large, atol=1e-4, rtol=0)


def test_parameters_without_gradient_stay():
    idle, busy = parameter(4, 4), parameter(4, 4)
    idle.grad, before = None, idle.detach().clone()
    muon([idle, busy], weight_decay=0.5).step()
    assert torch.equal(idle.detach(), before)


def test_each_group_has_its_own_rate():
    slow, fast = parameter(8, 8), parameter(8, 8)
    start = slow.detach().clone()
    groups = [{"params": [slow], "lr": 0.01}, {"params": [fast], "lr": 0.03}]
    Muon(groups, lr=1.0, momentum=0.9, weight_decay=0.0).step()  # type: ignore[arg-type]
    torch.testing.assert_close((fast - start).detach(), 3 * (slow - start).detach(), atol=1e-5, rtol=1e-4)


def pair(seed: int = 0) -> tuple[list[nn.Parameter], OptimizerGroup]:
    params = [parameter(8, 8, seed=seed), parameter(8, seed=seed + 1)]
    adamw = torch.optim.AdamW([params[1]], lr=0.01)
    return params, OptimizerGroup({"muon": muon([params[0]]), "adamw": adamw})


def test_a_group_goes_on_from_its_saved_state_to_the_bit():
    params, group = pair()
    group.step()
    state, values = copy.deepcopy(group.state_dict()), [p.detach().clone() for p in params]
    group.step()
    again, resumed = pair(seed=5)
    with torch.no_grad():
        for p, value in zip(again, values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_a_group_is_one_optimizer_to_the_loop():
    params, group = pair()
    assert [g["lr"] for g in group.param_groups] == [0.1, 0.01]
    for g in group.param_groups:
        g["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    group.step()
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    group.zero_grad()
    assert all(p.grad is None for p in params)


def test_the_state_of_other_optimizers_is_refused():
    _, group = pair()
    with pytest.raises(ValueError, match=r"holds \['adamw'\].*uses \['adamw', 'muon'\]"):
        group.load_state_dict({"adamw": {}})


@pytest.mark.parametrize(("phase", "decay"), [("pretrain", 0.1), ("sft", 0.05)])
def test_adamw_has_the_settings_of_its_phase_and_every_parameter_once(phase, decay):
    model = GPT(ModelConfig(V=32, T=8, C=16, L=2, H=2, d_ff=32, dropout=0.0, rope_theta=1e4), NEW)
    options = getattr(default_settings().training, phase)
    (all_of_them,) = build_optimizer(model, options).param_groups
    assert all_of_them["weight_decay"] == decay
    for optimizer in ("adamw", "muon"):
        changes = {"optimizer": optimizer, "decay_norm_and_bias": False, "decay_embeddings": False}
        groups = build_optimizer(model, options.model_copy(update=changes)).param_groups
        assert len(groups) == 2  # Muon has all matrices but the embedding, which is spared as the norms are
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        *decayed, spared = groups
        assert {id(p) for p in spared["params"]} == {id(p) for p in model.parameters() if p.ndim < 2} | {
            id(model.tok_emb.weight)
        }
        assert spared["weight_decay"] == 0.0
        assert [g["weight_decay"] for g in decayed] == [decay if optimizer == "adamw" else options.muon_weight_decay]
