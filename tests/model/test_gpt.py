"""The forward pass: against the published vectors, against the equations written anew, and against itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from niels_gpt.checkpoint import build_model, load_checkpoint
from niels_gpt.config import V1, V2, Architecture
from niels_gpt.model import blocks
from niels_gpt.model.blocks import RMSNorm
from niels_gpt.model.gpt import GPT, Trace
from tests.model.plain_forward import plain_forward
from tests.reference import BUNDLE, needs_bundle
from tests.varied import GENERATIONS, random_ids, varied_model

PUBLISHED = {"v1": ("v1/best_with_opt.pt", "v1"), "v2": ("v2/checkpoint/lib_no_opt.pt", "v2/vectors")}
SMALL = varied_model().cfg
all_generations = pytest.mark.parametrize("arch", GENERATIONS.values(), ids=GENERATIONS)
both_published = pytest.mark.parametrize("generation", PUBLISHED)


def ids(B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.tensor(random_ids(B * T, SMALL.V, seed)).view(B, T)


def published(generation: str):
    """The bundle's model in eval mode, and a reader of its vectors."""
    checkpoint, folder = PUBLISHED[generation]
    model = build_model(load_checkpoint(BUNDLE / checkpoint, device="cpu")).eval()
    return model, lambda name: torch.from_numpy(np.load(BUNDLE / folder / f"{name}.npy"))


@needs_bundle
@both_published
def test_published_logits(generation):
    model, vector = published(generation)
    logits = model(vector("input_2x40"))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, vector("logits_2x40"), atol=1e-4, rtol=0)


@needs_bundle
def test_published_logits_at_full_context_and_in_double():
    model, vector = published("v2")
    torch.testing.assert_close(model(vector("input_1x64")), vector("logits_1x64"), atol=1e-4, rtol=0)
    torch.testing.assert_close(model(vector("input_2x40")).double(), vector("logits_2x40_float64"), atol=1e-4, rtol=0)


@needs_bundle
@both_published
@pytest.mark.parametrize("layer", range(3))
def test_published_attention_rows(generation, layer):
    model, vector = published(generation)
    _, trace = model.forward_with_attn_trace(vector("input_2x40"), trace_layer=layer)
    torch.testing.assert_close(trace["attn_row"], vector(f"attn_row_layer{layer}_2x40"), atol=1e-5, rtol=0)
    assert trace["attn_full"] is None


@needs_bundle
@both_published
def test_published_attention_map(generation):
    model, vector = published(generation)
    x, cfg = vector("input_2x40"), model.cfg
    with torch.no_grad():  # as traces are taken; training's kernels err 1.08e-5 at most here, and as much on average
        _, trace = model.forward_with_attn_trace(x, trace_layer=1, return_full_attn=True)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    _, exact = plain_forward(state, x, L=cfg.L, H=cfg.H, theta=cfg.rope_theta)
    torch.testing.assert_close(trace["attn_full"].double(), exact[1], atol=1e-5, rtol=0)
    # The v2 recording is itself 1.09e-5 from a float64 run of the same equations; this model is nearer to that run.
    torch.testing.assert_close(trace["attn_full"], vector("attn_full_layer1_2x40"), atol=2e-5, rtol=0)


@needs_bundle
def test_published_loss_and_gradients():
    model, vector = published("v2")
    expected = json.loads((BUNDLE / "v2/vectors/loss_and_grads.json").read_text())
    targets = vector("targets_2x40")
    loss = model(vector("input_2x40"), targets) / targets.numel()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-4)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == expected["grad_norms"].keys()
    for name, value in expected["grad_norms"].items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@all_generations
def test_forward_is_the_equations(arch):
    model, x = varied_model(arch), ids(2, SMALL.T)
    state = dict(model.state_dict())
    expected, maps = plain_forward(state, x, L=SMALL.L, H=SMALL.H, theta=SMALL.rope_theta)
    logits = model(x)
    assert logits.std() > 0.5, "the model is too flat to prove anything"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for layer in range(SMALL.L):
        traced, trace = model.forward_with_attn_trace(x, trace_layer=layer, return_full_attn=True)
        torch.testing.assert_close(traced, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(trace["attn_full"], maps[layer], atol=1e-5, rtol=0)
        torch.testing.assert_close(trace["attn_row"], maps[layer][:, :, -1], atol=1e-5, rtol=0)


@all_generations
def test_gradients_are_those_of_the_equations(arch):
    model, x = varied_model(arch), ids(2, 12)
    y = ids(2, 12, seed=2)
    y[0, :5] = -100
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, _ = plain_forward(state, x, L=SMALL.L, H=SMALL.H, theta=SMALL.rope_theta)
    nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").backward()
    model(x, y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@all_generations
def test_a_later_token_changes_no_earlier_logits(arch):
    model, x = varied_model(arch), ids(2, SMALL.T)
    before = model(x)
    for position in (1, SMALL.T // 2, SMALL.T - 1):
        changed = x.clone()
        changed[:, position] = (x[:, position] + 1) % SMALL.V
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position], before[:, position])


@all_generations
@pytest.mark.parametrize("traced", [False, True])
def test_packed_rows_equal_separate_rows(arch, traced):
    """Segments only see themselves. Rotary positions are relative, so where a segment starts does not matter."""
    model, (a, b, c) = varied_model(arch), (ids(1, n, seed=n) for n in (7, 9, 5))
    packed = torch.cat([a, b, c], dim=1)
    segment = torch.tensor([[0] * 7 + [1] * 9 + [2] * 5])
    trace = Trace(1, full=True) if traced else None
    logits = model(packed, segment=segment, trace=trace)
    separate = torch.cat([model(part) for part in (a, b, c)], dim=1)
    torch.testing.assert_close(logits, separate, atol=1e-4, rtol=0)
    if trace is not None:
        foreign = segment[:, :, None] != segment[:, None, :]
        assert trace.attn_full[:, :, foreign[0]].abs().max() == 0


@all_generations
def test_activation_checkpointing_gives_equal_gradients(arch):
    x, y = ids(2, 16), ids(2, 16, seed=2)
    gradients = []
    for wanted in (False, True):
        model = varied_model(arch, dropout=0.2).train()
        model.activation_checkpointing = wanted
        torch.manual_seed(7)
        loss = model(x, y)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def expected_names(arch: Architecture, L: int) -> list[str]:
    """Tensor names in their published order, with what new models add after `proj`."""
    layernorm, gelu = arch.norm_type == "layernorm", arch.mlp_type == "gelu"

    def norm(name):
        return [f"{name}.weight", *([f"{name}.bias"] if layernorm else [])]

    def linear(name):
        return [f"{name}.weight", *([f"{name}.bias"] if arch.mlp_bias else [])]

    names = ["tok_emb.weight"]
    for i in range(L):
        block = f"blocks.{i}"
        names += [*norm(f"{block}.ln1"), f"{block}.attn.qkv.weight", f"{block}.attn.proj.weight"]
        names += [f"{block}.attn.{n}_norm.weight" for n in ("q", "k") if arch.qk_norm]
        names += norm(f"{block}.ln2")
        for part in ("fc1", "fc2") if gelu else ("fc_a", "fc_g", "fc_out"):
            names += linear(f"{block}.mlp.{part}")
    return [*names, *norm("ln_f"), "lm_head.weight"]


@all_generations
def test_state_dict_names_and_order(arch):
    state = GPT(SMALL, arch).state_dict()
    assert list(state) == expected_names(arch, SMALL.L)
    assert all(t.dtype == torch.float32 for t in state.values())
    assert state["lm_head.weight"].data_ptr() == state["tok_emb.weight"].data_ptr()
    assert len(state) == {V1: 10 * SMALL.L + 4, V2: 10 * SMALL.L + 3}.get(arch, len(state))


@needs_bundle
@both_published
def test_state_dict_has_the_published_names_and_order(generation):
    index = json.loads((BUNDLE / PUBLISHED[generation][0]).with_name("state_dict_index.json").read_text())
    model, _ = published(generation)
    assert [(t["key"], t["shape"]) for t in index["tensors"]] == [
        (name, list(tensor.shape)) for name, tensor in model.state_dict().items()
    ]
    assert model.num_parameters == index["n_params_unique"]


@all_generations
def test_parameter_count(arch):
    V, C, L, d_ff, D = SMALL.V, SMALL.C, SMALL.L, SMALL.d_ff, SMALL.C // SMALL.H
    formula = {
        "v1": V * C + L * (4 * C**2 + 2 * C * d_ff + d_ff + 5 * C) + 2 * C,
        "v2": V * C + L * (4 * C**2 + 3 * C * d_ff + 2 * d_ff + 3 * C) + C,
        "new": V * C + L * (4 * C**2 + 3 * C * d_ff + 2 * D + 2 * C) + C,
    }
    name = next(n for n, a in GENERATIONS.items() if a == arch)
    assert GPT(SMALL, arch).num_parameters == formula[name]


@all_generations
def test_initial_weights(arch):
    cfg = replace(SMALL, V=300, C=64, d_ff=128)
    torch.manual_seed(0)
    model = GPT(cfg, arch)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.mean().abs() < 6 * 0.02 / p.numel() ** 0.5, name
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
    torch.manual_seed(0)
    again = GPT(cfg, arch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@all_generations
def test_dropout_only_in_training_mode(arch):
    model, x = varied_model(arch, dropout=0.5), ids(2, 16)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), varied_model(arch)(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


def test_traced_rows_are_recorded_before_dropout():
    model, x = varied_model(dropout=0.5).train(), ids(2, 16)
    _, trace = model.forward_with_attn_trace(x, trace_layer=1, return_full_attn=True)
    torch.testing.assert_close(trace["attn_full"].sum(-1), torch.ones(2, SMALL.H, 16))
    assert not trace["attn_row"].requires_grad


def test_rms_norm_has_its_eps_inside_the_root():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(RMSNorm(4)(x), x / (1e-6 + 1e-5) ** 0.5)


def test_what_forward_refuses():
    model = varied_model()
    for x in (ids(1, 4)[0], ids(1, SMALL.T + 1)):
        with pytest.raises(AssertionError):
            model(x)
    for layer in (-1, SMALL.L):
        with pytest.raises(ValueError, match="out of range"):
            model.forward_with_attn_trace(ids(1, 4), trace_layer=layer)


def test_a_model_holds_no_other_state():
    assert not any(name.startswith("blocks.0.attn.rope") for name in varied_model().state_dict())


@pytest.mark.parametrize("packed", [False, True])
def test_explicit_bf16_attention_agrees_with_the_fused_kernel(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short path for bf16 on CPUs is a choice of speed: the same values and gradients, but for rounding."""
    x = torch.tensor([random_ids(24, 61, seed=s) for s in (1, 2)])
    segment = torch.arange(24).expand(2, -1) // 9 if packed else None
    results = []
    for explicit in (True, False):
        monkeypatch.setattr(blocks, "_explicit_is_faster", lambda q, k, explicit=explicit: explicit)
        model = varied_model()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x, x, segment=segment) / x.numel()
        loss.backward()
        results.append((loss.item(), model.blocks[0].attn.qkv.weight.grad))
    (one, grad), (other, expected) = results
    assert one == pytest.approx(other, rel=0.02)
    assert torch.nn.functional.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.99


def test_explicit_attention_is_for_short_bf16_rows_on_cpus_alone() -> None:
    q = torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)
    assert blocks._explicit_is_faster(q, q)
    assert not blocks._explicit_is_faster(q.float(), q.float())
    assert not blocks._explicit_is_faster(q[:, :, :1], q)  # decoding
    assert not blocks._explicit_is_faster(q, torch.zeros(1, 1, blocks.SHORT + 1, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_blocks_learn_the_same(backend: str) -> None:
    model, x = varied_model(dropout=0.0).train(), ids(2, 9)

    def learnt() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(x, x)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = learnt()
    model.compile_blocks(backend)
    for one, other in zip(learnt(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 3, 5, 8), (1, 4)])
def test_the_written_out_norm_is_pytorchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1], generator=generator, dtype=torch.float64))
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = norm.weight.detach().clone().requires_grad_()
    theirs = F.rms_norm(x, weight.shape, weight, norm.eps)
    torch.testing.assert_close(norm(x), theirs)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours_x, ours_w = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    theirs_x, theirs_w = torch.autograd.grad(theirs, (x, weight), grad)
    torch.testing.assert_close(ours_x, theirs_x)
    torch.testing.assert_close(ours_w, theirs_w)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), theirs)
