"""Which plain architecture represents a model exactly, and the names and layouts of its tensors there.

Ours turns neighbouring numbers (2j, 2j+1) of a head by one angle; transformers turns (j, j + D/2). The rows of q and k,
and the weights of their norms, change places accordingly: nothing is computed, so the way back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from niels_gpt.config import Architecture, ModelConfig

QWEN3, LLAMA, NEOX = "qwen3", "llama", "gpt_neox"
State = dict[str, Tensor]


def architecture_for(arch: Architecture) -> str:
    """The model_type in transformers that computes exactly this; ValueError if no plain one does."""
    if arch.norm_type == "layernorm" and arch.mlp_type == "gelu" and not arch.qk_norm:
        return NEOX  # without MLP biases: with biases of zero
    if arch.norm_type == "rmsnorm" and arch.mlp_type == "swiglu":
        if not arch.qk_norm:
            return LLAMA
        if not arch.mlp_bias:
            return QWEN3
    raise ValueError(
        f"no plain architecture computes {arch.norm_type} with a {arch.mlp_type} MLP, mlp_bias={arch.mlp_bias} and"
        f" qk_norm={arch.qk_norm}: exports know rmsnorm+swiglu with qk_norm (Qwen3), with mlp_bias or neither"
        " (Llama), and layernorm+gelu (GPT-NeoX)"
    )


def halves(x: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) from neighbouring pairs to halves: the even ones of each head, then the odd ones."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def pairs(x: Tensor, heads: int) -> Tensor:
    """The inverse of `halves`."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


# theirs, after `model.layers.N.` -> ours, after `blocks.N.`
_SWIGLU_BLOCK = {
    "input_layernorm.weight": "ln1.weight",
    "post_attention_layernorm.weight": "ln2.weight",
    "self_attn.o_proj.weight": "attn.proj.weight",
    "mlp.gate_proj.weight": "mlp.fc_g.weight",
    "mlp.up_proj.weight": "mlp.fc_a.weight",
    "mlp.down_proj.weight": "mlp.fc_out.weight",
}
_SWIGLU_BIASES = {
    "mlp.gate_proj.bias": "mlp.fc_g.bias",
    "mlp.up_proj.bias": "mlp.fc_a.bias",
    "mlp.down_proj.bias": "mlp.fc_out.bias",
}
_QK_NORMS = {"self_attn.q_norm.weight": "attn.q_norm.weight", "self_attn.k_norm.weight": "attn.k_norm.weight"}
_SWIGLU_WHOLE = {"model.embed_tokens.weight": "tok_emb.weight", "model.norm.weight": "ln_f.weight"}

_NEOX_BLOCK = {
    "input_layernorm.weight": "ln1.weight",
    "input_layernorm.bias": "ln1.bias",
    "post_attention_layernorm.weight": "ln2.weight",
    "post_attention_layernorm.bias": "ln2.bias",
    "attention.dense.weight": "attn.proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.fc2.weight",
}
_NEOX_WHOLE = {
    "gpt_neox.embed_in.weight": "tok_emb.weight",
    "gpt_neox.final_layer_norm.weight": "ln_f.weight",
    "gpt_neox.final_layer_norm.bias": "ln_f.bias",
}


def to_hf(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    """Our state dict under the names and in the layout of `architecture_for(arch)`; the tied head is not repeated."""
    return _to_neox(state, cfg, arch) if architecture_for(arch) == NEOX else _to_swiglu(state, cfg, arch)


def _to_swiglu(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    found = {theirs: state[ours] for theirs, ours in _SWIGLU_WHOLE.items()}
    for i in range(cfg.L):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        names = _SWIGLU_BLOCK | (_SWIGLU_BIASES if arch.mlp_bias else {})
        found |= {there + theirs: state[here + ours] for theirs, ours in names.items()}
        q, k, v = state[here + "attn.qkv.weight"].chunk(3)
        found[there + "self_attn.q_proj.weight"] = halves(q, cfg.H)
        found[there + "self_attn.k_proj.weight"] = halves(k, cfg.H)
        found[there + "self_attn.v_proj.weight"] = v.contiguous()
        if arch.qk_norm:
            found |= {there + theirs: halves(state[here + ours], 1) for theirs, ours in _QK_NORMS.items()}
    return found


def _to_neox(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    found = {theirs: state[ours] for theirs, ours in _NEOX_WHOLE.items()}
    for i in range(cfg.L):
        here, there = f"blocks.{i}.", f"gpt_neox.layers.{i}."
        found |= {there + theirs: state[here + ours] for theirs, ours in _NEOX_BLOCK.items()}
        for theirs, ours, width in (("dense_h_to_4h", "fc1", cfg.d_ff), ("dense_4h_to_h", "fc2", cfg.C)):
            bias = state[f"{here}mlp.{ours}.bias"] if arch.mlp_bias else torch.zeros(width)
            found[f"{there}mlp.{theirs}.bias"] = bias
        q, k, v = state[here + "attn.qkv.weight"].chunk(3)
        by_head = [w.unflatten(0, (cfg.H, -1)) for w in (halves(q, cfg.H), halves(k, cfg.H), v)]
        found[there + "attention.query_key_value.weight"] = torch.stack(by_head, dim=1).flatten(0, 2)  # (H, 3, D, C)
    return found


def from_hf(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    """The inverse of `to_hf`: our state dict, the head tied. KeyError if a tensor is missing."""
    found = _from_neox(state, cfg, arch) if architecture_for(arch) == NEOX else _from_swiglu(state, cfg, arch)
    found["lm_head.weight"] = found["tok_emb.weight"]
    return found


def _from_swiglu(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    found = {ours: state[theirs] for theirs, ours in _SWIGLU_WHOLE.items()}
    for i in range(cfg.L):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        names = _SWIGLU_BLOCK | (_SWIGLU_BIASES if arch.mlp_bias else {})
        found |= {here + ours: state[there + theirs] for theirs, ours in names.items()}
        q, k, v = (state[f"{there}self_attn.{letter}_proj.weight"] for letter in "qkv")
        found[here + "attn.qkv.weight"] = torch.cat([pairs(q, cfg.H), pairs(k, cfg.H), v])
        if arch.qk_norm:
            found |= {here + ours: pairs(state[there + theirs], 1) for theirs, ours in _QK_NORMS.items()}
    return found


def _from_neox(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> State:
    found = {ours: state[theirs] for theirs, ours in _NEOX_WHOLE.items()}
    for i in range(cfg.L):
        here, there = f"blocks.{i}.", f"gpt_neox.layers.{i}."
        found |= {here + ours: state[there + theirs] for theirs, ours in _NEOX_BLOCK.items()}
        if arch.mlp_bias:
            found[here + "mlp.fc1.bias"] = state[there + "mlp.dense_h_to_4h.bias"]
            found[here + "mlp.fc2.bias"] = state[there + "mlp.dense_4h_to_h.bias"]
        fused = state[there + "attention.query_key_value.weight"].unflatten(0, (cfg.H, 3, -1))
        q, k, v = (part.flatten(0, 1) for part in fused.unbind(1))
        found[here + "attn.qkv.weight"] = torch.cat([pairs(q, cfg.H), pairs(k, cfg.H), v])
    return found
