"""From a folder of the Llama family to a checkpoint: the same function, or the exact reason why not.

What is not ours but can be written exactly as ours is: grouped keys and values (each head gets its copy), an untied
head that equals the embedding, 16-bit weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt import files
from niels_gpt.config import NEW, V1, V2, Architecture, ModelConfig
from niels_gpt.export import hf_tokenizer, names
from niels_gpt.export.needs import needed
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import SentencePieceTokenizer

Json = dict[str, Any]
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_IGNORED = ("rotary_emb.inv_freq", "attention.bias", "masked_bias")  # no weights: computed again when a model is loaded
_PLAIN = Architecture(norm_type="rmsnorm", mlp_type="swiglu", mlp_bias=False, qk_norm=False)


@dataclass(frozen=True)
class Imported:
    """What a folder holds, in our terms."""

    cfg: ModelConfig
    arch: Architecture
    state: names.State
    tokenizer_model: bytes | None  # of this project's tokenizers; None for byte models and for foreign tokenizers
    tokenizer_sha256: str | None  # of the file that text must be encoded with; None for byte models
    notes: tuple[str, ...]


def read_hf(folder: Path) -> Imported:
    """Read a folder; FileNotFoundError, or ValueError that names everything in it that is not supported."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"there is no config.json in {folder}: name a folder as transformers saves it")
    config = files.read_json(config_file)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object, as transformers saves it")
    reasons = unsupported(config)
    if reasons:
        raise ValueError(f"{folder} cannot become a checkpoint: " + "; ".join(reasons))
    state = _in_float32(folder, _weights(folder))
    arch = _architecture(config)
    cfg = _model_config(config)
    notes = _tie_head(state, config)
    heads, shared = cfg.H, _kv_heads(config)
    if shared != heads:
        _ungroup(state, cfg, shared)
        notes.append(f"{shared} key-value heads were copied to {heads}: this model has one for each head")
    _check_names(state, cfg, arch)
    model, sha256, more = _tokenizer(folder, cfg)
    return Imported(cfg, arch, names.from_hf(state, cfg, arch), model, sha256, (*notes, *more))


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Everything in a `config.json` that this project's model does not compute."""
    kind = config.get("model_type")
    if kind not in (names.LLAMA, names.QWEN3, names.NEOX):
        return [f"model_type {kind!r} is not supported (llama, qwen3 and gpt_neox are)"]
    if impossible := _impossible(config):
        return impossible
    rope = _rope(config)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    wanted: list[tuple[str, Any, Any]] = [
        ("quantization_config", config.get("quantization_config"), None),
        ("rope scaling", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("the share of a head that is rotated", _rotated(config, rope), 1.0),
    ]
    if kind == names.NEOX:
        wanted += [
            ("hidden_act", config.get("hidden_act", "gelu"), "gelu"),
            ("layer_norm_eps", config.get("layer_norm_eps", NORM_EPS), NORM_EPS),
            ("use_parallel_residual", config.get("use_parallel_residual", True), False),
            ("attention_bias", config.get("attention_bias", True), False),
        ]
    else:
        wanted += [
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("rms_norm_eps", config.get("rms_norm_eps", 1e-6), NORM_EPS),
            ("attention_bias", config.get("attention_bias", False), False),
            ("head_dim", config.get("head_dim") or (128 if kind == names.QWEN3 else head_dim), head_dim),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
        ]
    if kind == names.QWEN3:
        wanted.append(("mlp_bias", config.get("mlp_bias", False), False))
    return [f"{name} is {found!r}, this model has {ours!r}" for name, found, ours in wanted if found != ours]


def _impossible(config: Mapping[str, Any]) -> list[str]:
    """Values of a `config.json` that no model can have: not of their type, or not fitting each other."""
    counts = ("vocab_size", "max_position_embeddings", *_COUNTS)
    if wrong := [name for name in counts if not _is_count(config.get(name))]:
        return [f"its config.json has no whole number for {', '.join(wrong)}"]
    said = []
    width, heads, shared = config["hidden_size"], config["num_attention_heads"], _kv_heads(config)
    if width % heads:
        said.append(f"hidden_size is {width}, which must be a multiple of num_attention_heads, {heads}")
    if not _is_count(shared) or heads % shared:
        said.append(f"num_key_value_heads is {json.dumps(shared)}, which must divide num_attention_heads, {heads}")
    if no_objects := [
        name for name in ("rope_parameters", "rope_scaling") if not isinstance(config.get(name) or {}, dict)
    ]:
        said += [f"{name} is {json.dumps(config[name])}, which must be an object, or null" for name in no_objects]
    else:
        name, base = _rope_base(config)
        if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base <= sys.float_info.max:
            said.append(f"{name} is {json.dumps(base)}, which must be a number above 0")
    return [f"in its config.json {'; '.join(said)}"] if said else []


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _rope(config: Mapping[str, Any]) -> Json:
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _rope_base(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The base of the rotary wavelengths, and the key that it is under."""
    for name, holder in (("rope_theta", _rope(config)), ("rope_theta", config), ("rotary_emb_base", config)):
        if name in holder:
            return name, holder[name]
    return "rope_theta", 10000.0


def _rotated(config: Mapping[str, Any], rope: Json) -> Any:
    if config["model_type"] == names.NEOX:
        return rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))


def _architecture(config: Mapping[str, Any]) -> Architecture:
    if config["model_type"] == names.NEOX:
        return V1
    if config["model_type"] == names.QWEN3:
        return NEW
    return V2 if config.get("mlp_bias", False) else _PLAIN


def _model_config(config: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        V=config["vocab_size"],
        T=config["max_position_embeddings"],
        C=config["hidden_size"],
        L=config["num_hidden_layers"],
        H=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        dropout=0.0,
        rope_theta=float(_rope_base(config)[1]),
    )


def _kv_heads(config: Mapping[str, Any]) -> Any:
    shared = config.get("num_key_value_heads")
    return config["num_attention_heads"] if shared is None else shared


def _weights(folder: Path) -> names.State:
    """All tensors of the folder's safetensors, one file or several."""
    load = needed("safetensors.torch").load_file
    index = folder / "model.safetensors.index.json"
    shards = _shards(index) if index.is_file() else ["model.safetensors"]
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; weights must be safetensors")
    found: names.State = {}
    for name in shards:
        try:
            found |= load(folder / name)
        except Exception as error:  # safetensors has its own error type for a damaged file
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
    return found


def _in_float32(folder: Path, found: names.State) -> names.State:
    """The weights; ValueError names one that is of whole numbers, as quantised weights are, or not finite."""
    state, no = {}, f"{folder} cannot become a checkpoint"
    for name, tensor in found.items():
        if name.endswith(_IGNORED):
            continue
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{no}: its weights {name} are of type {kind}: quantised weights are not supported")
        weights = tensor.float()
        if not weights.isfinite().all():
            raise ValueError(f"{no}: its weights {name} hold NaN or infinity; they are damaged, or training failed")
        state[name.removeprefix("_orig_mod.")] = weights
    return state


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    content = files.read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} has no weight_map, which says in which file each weight is")
    return sorted(set(placed.values()))


def _tie_head(state: names.State, config: Mapping[str, Any]) -> list[str]:
    """Take the head out if it is the embedding; ValueError if it is not."""
    embedding = state.get("gpt_neox.embed_in.weight", state.get("model.embed_tokens.weight"))
    head = state.pop("embed_out.weight", state.pop("lm_head.weight", None))
    if head is None or embedding is None:
        return []
    tied = config.get("tie_word_embeddings", False)
    if not tied and not torch.equal(head, embedding):
        raise ValueError("the output head is not tied to the embedding: models with an untied head are not supported")
    return [] if tied else ["the head equals the embedding and is tied from now on"]


def _ungroup(state: names.State, cfg: ModelConfig, shared: int) -> None:
    for name, tensor in list(state.items()):
        if name.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight")):
            by_head: Tensor = tensor.unflatten(0, (shared, -1))
            state[name] = by_head.repeat_interleave(cfg.H // shared, dim=0).flatten(0, 1)


def _check_names(state: names.State, cfg: ModelConfig, arch: Architecture) -> None:
    with torch.device("meta"):
        expected = names.to_hf(GPT(cfg, arch).state_dict(), cfg, arch)
    missing, extra = set(expected) - set(state), set(state) - set(expected)
    if missing or extra:
        said = [f"lacks {', '.join(sorted(missing)[:4])}"] if missing else []
        said += [f"holds the unexpected {', '.join(sorted(extra)[:4])}"] if extra else []
        raise ValueError("the folder " + " and ".join(said))
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the config asks for {tuple(tensor.shape)}")


def _tokenizer(folder: Path, cfg: ModelConfig) -> tuple[bytes | None, str | None, list[str]]:
    """This project's tokenizer if the folder holds one: (model bytes, sha256, notes)."""
    spm, json_file = folder / "spm.model", folder / "tokenizer.json"
    if spm.is_file():
        tokenizer = SentencePieceTokenizer(spm)
        return tokenizer.model_bytes, tokenizer.sha256, []
    if json_file.is_file() and cfg.V == 256 and files.read_json(json_file) == _byte_tokenizer():
        return None, None, []
    sha256 = files.sha256_file(json_file) if json_file.is_file() else "0" * 64
    return (
        None,
        sha256,
        [
            "its tokenizer is not one of this project, so the checkpoint holds weights only: it takes token ids from"
            " that tokenizer, and does not chat"
        ],
    )


def _byte_tokenizer() -> Any:
    return json.loads(hf_tokenizer.byte_json())
