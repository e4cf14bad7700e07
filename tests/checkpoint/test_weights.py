"""Recognising architectures, and naming the tensor that does not fit."""

from dataclasses import replace

import pytest
import torch

from niels_gpt.checkpoint import (
    architecture_of,
    build_model,
    load_checkpoint,
    load_into,
    validate_model_config_match,
)
from niels_gpt.checkpoint.format import Checkpoint
from niels_gpt.config import V1, V2, Architecture, to_dict
from niels_gpt.model.gpt import GPT
from tests.checkpoint.samples import TINY, save, trained
from tests.reference import BUNDLE, needs_bundle
from tests.varied import GENERATIONS


def checkpoint(arch: Architecture = V2, **model_cfg: object) -> Checkpoint:
    state = {name: tensor.clone() for name, tensor in trained(arch)[0].state_dict().items()}
    return {
        "model_cfg": {**to_dict(TINY), **model_cfg},
        "train_cfg": {},
        "model_state": state,
        "optimizer_state": None,
        "step": 0,
        "best_val_loss": None,
        "resume": None,
        "tokenizer_model": None,
    }


@pytest.mark.parametrize(
    "arch",
    [
        *GENERATIONS.values(),
        Architecture(norm_type="rmsnorm", mlp_type="gelu", mlp_bias=False, qk_norm=False),
        Architecture(norm_type="layernorm", mlp_type="swiglu", mlp_bias=True, qk_norm=True),
    ],
)
def test_every_architecture_is_recognised_from_its_names(arch):
    assert architecture_of(GPT(TINY, arch).state_dict()) == arch
    assert build_model(checkpoint(arch)).arch == arch


@needs_bundle
def test_published_files_are_recognised():
    for name, arch in (("v1/best_with_opt.pt", V1), ("v2/checkpoint/lib_no_opt.pt", V2)):
        found = load_checkpoint(BUNDLE / name, device="cpu")
        assert architecture_of(found["model_state"]) == arch
        assert build_model(found).arch == arch


def test_weights_of_something_else_are_not_recognised():
    for state in ({}, {"layers.0.weight": torch.zeros(2)}):
        with pytest.raises(ValueError, match="neither"):
            architecture_of(state)


def test_unknown_keys_of_model_cfg_are_ignored():
    assert build_model(checkpoint(_raw={"norm_type": "rmsnorm"}, note="x")).cfg == TINY


def test_building_leaves_the_random_state_alone_and_trains():
    given = checkpoint()
    before = torch.get_rng_state()
    model = build_model(given)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.lm_head.weight is model.tok_emb.weight


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.1.mlp.fc_g.bias", "ln_f.weight"])
def test_a_wrong_shape_names_the_tensor(name):
    bad = checkpoint()
    bad["model_state"][name] = torch.zeros(*bad["model_state"][name].shape, 2)
    with pytest.raises(ValueError, match=rf"{name} has shape"):
        build_model(bad)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc_a\.weight has shape .* model_cfg asks for \(25, 16\)"):
        build_model(checkpoint(d_ff=25))


def test_missing_and_unexpected_tensors_are_named():
    bad = checkpoint()
    bad["model_state"]["blocks.1.extra.weight"] = bad["model_state"].pop("blocks.1.ln2.weight")
    with pytest.raises(ValueError, match=r"lack blocks\.1\.ln2\.weight and hold the unexpected blocks\.1\.extra\."):
        build_model(bad)


def test_an_untied_head_is_refused():
    bad = checkpoint()
    bad["model_state"]["lm_head.weight"] = bad["model_state"]["lm_head.weight"] + 1e-3
    with pytest.raises(ValueError, match="untied"):
        build_model(bad)


def test_weights_that_are_not_finite_or_not_floating_are_refused():
    bad = checkpoint()
    bad["model_state"]["ln_f.weight"][3] = torch.nan
    with pytest.raises(ValueError, match=r"ln_f\.weight holds NaN"):
        build_model(bad)
    bad["model_state"]["ln_f.weight"] = torch.ones(16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ln_f\.weight .* torch\.int64"):
        build_model(bad)


@pytest.mark.parametrize(
    "change",
    [{"L": 10**9}, {"V": 10**12}, {"C": "16"}, {"C": 16.0}, {"H": 3}, {"H": True}, {"dropout": float("nan")}, {"T": 0}],
)
def test_a_model_cfg_that_lies_is_refused_before_anything_is_allocated(change):
    with pytest.raises(ValueError):
        build_model(checkpoint(**change))
    with pytest.raises(ValueError, match="lacks"):
        build_model({**checkpoint(), "model_cfg": {"V": 33}})


def test_validate_model_config_match_lists_every_difference(tmp_path):
    save(tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", device="cpu")["model_cfg"]
    validate_model_config_match({**loaded, "_raw": 1}, TINY)
    validate_model_config_match(TINY, loaded)
    for name, value in {**to_dict(TINY), "dropout": 0.1, "rope_theta": 1e4}.items():
        with pytest.raises(ValueError, match=rf"in model\.{name} \(checkpoint {value}, settings {value * 2}\)$"):
            validate_model_config_match(loaded, {**to_dict(TINY), name: value * 2})
    with pytest.raises(ValueError, match=r"model\.T \(.*\), model\.dropout \(.*\)"):
        validate_model_config_match(loaded, replace(TINY, T=16, dropout=0.0))


def test_weights_go_into_the_same_model_only():
    given = checkpoint(V2, _raw={"qk_norm": True})
    model = GPT(TINY, V2)
    load_into(model, given)
    assert all(torch.equal(value, given["model_state"][name]) for name, value in model.state_dict().items())
    other = replace(V2, mlp_bias=False, qk_norm=True)
    settings = (
        r"model\.mlp_bias \(checkpoint True, settings False\), model\.qk_norm \(checkpoint False, settings True\)$"
    )
    with pytest.raises(ValueError, match=settings):
        load_into(GPT(TINY, other), given)
    with pytest.raises(ValueError, match=r"model\.T \(.*\), model\.qk_norm \(.*\)$"):
        load_into(GPT(replace(TINY, T=4), replace(V2, qk_norm=True)), given)
    given["model_state"]["ln_f.weight"][3] = torch.nan
    with pytest.raises(ValueError, match=r"ln_f\.weight holds NaN"):
        load_into(model, given)
