"""From tensors to a model: recognising the architecture, and naming what does not fit before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from niels_gpt.checkpoint.plain import check_finite
from niels_gpt.config import Architecture, ModelConfig, to_dict
from niels_gpt.model.gpt import GPT

if TYPE_CHECKING:
    from niels_gpt.checkpoint.format import Checkpoint

MODEL_KEYS = tuple(f.name for f in fields(ModelConfig))
FRACTIONAL = ("dropout", "rope_theta")


def architecture_of(model_state: Mapping[str, Tensor]) -> Architecture:
    """Recognise the generation from tensor names; ValueError if they are no GPT of this project."""
    gelu, swiglu = ("blocks.0.mlp.fc1.weight" in model_state, "blocks.0.mlp.fc_g.weight" in model_state)
    if gelu == swiglu or "ln_f.weight" not in model_state:
        raise ValueError(
            "the weights are neither of the byte generation (blocks.0.mlp.fc1.weight) nor of the subword one"
            f" (blocks.0.mlp.fc_g.weight); they start with {', '.join(list(model_state)[:4]) or 'nothing'}"
        )
    return Architecture(
        norm_type="layernorm" if "ln_f.bias" in model_state else "rmsnorm",
        mlp_type="gelu" if gelu else "swiglu",
        mlp_bias=f"blocks.0.mlp.{'fc1' if gelu else 'fc_g'}.bias" in model_state,
        qk_norm="blocks.0.attn.q_norm.weight" in model_state,
    )


def model_config_of(values: Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """The eight keys of a `model_cfg`, checked; other keys, such as `_raw`, are ignored. ValueError names the key."""
    if isinstance(values, ModelConfig):
        return values
    for name in MODEL_KEYS:
        number = values.get(name, 1)
        kinds = (int, float) if name in FRACTIONAL else (int,)
        if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number):
            kind = "a finite number" if name in FRACTIONAL else "a whole number"
            raise ValueError(f"model_cfg.{name} must be {kind}, not {number!r}")
    return ModelConfig.from_dict(dict(values))


def check_weights(cfg: ModelConfig, model_state: Mapping[str, Tensor]) -> Architecture:
    """Check names, shapes, tying and finiteness against `cfg`; ValueError names the tensor."""
    arch = architecture_of(model_state)
    blocks = {name.split(".")[1] for name in model_state if name.startswith("blocks.")}
    if len(blocks) != cfg.L:
        raise ValueError(f"the weights have {len(blocks)} blocks, model_cfg.L says {cfg.L}")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(cfg, arch).state_dict().items()}
    missing = [name for name in expected if name not in model_state]
    unexpected = [name for name in model_state if name not in expected]
    if missing or unexpected:
        said = [f"lack {', '.join(missing[:5])}"] if missing else []
        said += [f"hold the unexpected {', '.join(unexpected[:5])}"] if unexpected else []
        raise ValueError("the weights " + " and ".join(said))
    for name, shape in expected.items():
        tensor = model_state[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and {tensor.dtype}; model_cfg asks for {shape}")
    if not torch.equal(model_state["lm_head.weight"], model_state["tok_emb.weight"]):
        raise ValueError("lm_head.weight differs from tok_emb.weight: models with an untied head are not supported")
    check_finite(dict(model_state))
    return arch


def build_model(checkpoint: Checkpoint) -> GPT:
    """The model of a checkpoint, on the device of its weights, in training mode; global random state is left alone."""
    cfg, state = model_config_of(checkpoint["model_cfg"]), checkpoint["model_state"]
    arch = check_weights(cfg, state)
    with torch.random.fork_rng(devices=[]):
        model = GPT(cfg, arch)
    model.load_state_dict(state)
    return model.to(state["tok_emb.weight"].device)


def load_into(model: GPT, checkpoint: Checkpoint) -> None:
    """Give a model the weights of a checkpoint; ValueError as of `check_same_model` and `check_weights`."""
    check_same_model(checkpoint, model.cfg, model.arch)
    check_weights(model.cfg, checkpoint["model_state"])
    model.load_state_dict(checkpoint["model_state"])


def check_same_model(checkpoint: Checkpoint, cfg: ModelConfig, arch: Architecture) -> None:
    """ValueError listing every setting of `model` in which a checkpoint and this run differ, the architecture's too."""
    theirs = {**checkpoint["model_cfg"], **to_dict(architecture_of(checkpoint["model_state"]))}
    _refuse_differences(theirs, {**to_dict(cfg), **to_dict(arch)}, (*MODEL_KEYS, *to_dict(arch)))


def validate_model_config_match(
    loaded: ModelConfig | Mapping[str, Any], current: ModelConfig | Mapping[str, Any]
) -> None:
    """ValueError listing every one of the eight fields in which a checkpoint and this run's settings differ."""
    theirs, ours = (dict(c) if isinstance(c, Mapping) else to_dict(c) for c in (loaded, current))
    _refuse_differences(theirs, ours, MODEL_KEYS)


def _refuse_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Iterable[str]) -> None:
    different = [
        f"model.{key} (checkpoint {theirs.get(key)}, settings {ours.get(key)})"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise ValueError("the checkpoint's model differs from the settings in " + ", ".join(different))
