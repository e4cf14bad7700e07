"""Writing and reading GGUF files, and what stands beside them for Ollama.

llama.cpp's architecture `llama` turns neighbouring pairs, as this project does, `qwen3` and `gptneox` halves, as
transformers does. Its `gptneox` wants biases and a head of its own where there are none: zeros, the embedding again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.config import Architecture, ModelConfig
from niels_gpt.export import names
from niels_gpt.export.gguf_vocab import GgufVocab, vocab_of
from niels_gpt.export.needs import needed
from niels_gpt.export.templates import (
    BROKEN,
    ollama_text_template,
    ollama_token_template,
    text_template,
    token_template,
)
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.model.gpt import GPT
from niels_gpt.special_tokens import EOT_TOKEN

DTYPES = ("f32", "f16", "q8_0")
ARCHITECTURES = {names.QWEN3: "qwen3", names.LLAMA: "llama", names.NEOX: "gptneox"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
_QKV, _DENSE = "attention.query_key_value", "attention.dense"


def write_gguf(loaded: LoadedModel, path: Path, dtype: str) -> None:
    """Write one file. ValueError: no architecture of llama.cpp, or no vocabulary of GGUF, represents this model."""
    vocab = vocab_of(loaded.tokenizer, loaded.model.cfg.V)
    write_model(
        loaded.model, path, dtype, loaded.checkpoint_path.stem, lambda writer: _add_vocab(writer, vocab, loaded)
    )


def write_model(model: GPT, path: Path, dtype: str, name: str, add_vocab: Callable[[Any], None]) -> None:
    """Write one file with whatever vocabulary `add_vocab` gives to gguf's writer. ValueError as `write_gguf`."""
    gguf = needed("gguf")
    cfg, arch = model.cfg, model.arch
    writer = gguf.GGUFWriter(path, ARCHITECTURES[names.architecture_for(arch)])
    writer.add_name(name)
    _add_shape(writer, cfg, arch, dtype)
    add_vocab(writer)
    for tensor_name, tensor in to_gguf(names.to_hf(model.state_dict(), cfg, arch), cfg, arch).items():
        values, kind = _stored(tensor_name, tensor.float().numpy(), dtype)
        writer.add_tensor(tensor_name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_exact(arch: Architecture) -> None:
    """ValueError if llama.cpp does not compute this architecture as it was trained."""
    if names.architecture_for(arch) == names.NEOX:
        raise ValueError(
            "llama.cpp computes GELU by a 16-bit tanh approximation, not exactly as this model was trained: its logits"
            " would differ by some thousandths. Export to hf, or pass --approximate-gelu to have the files all the same"
        )


def _add_shape(writer: Any, cfg: ModelConfig, arch: Architecture, dtype: str) -> None:
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    writer.add_vocab_size(cfg.V)
    writer.add_context_length(cfg.T)
    writer.add_embedding_length(cfg.C)
    writer.add_block_count(cfg.L)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.H)
    writer.add_head_count_kv(cfg.H)
    writer.add_key_length(cfg.C // cfg.H)
    writer.add_value_length(cfg.C // cfg.H)
    writer.add_rope_dimension_count(cfg.C // cfg.H)
    writer.add_rope_freq_base(cfg.rope_theta)
    if arch.norm_type == "layernorm":
        writer.add_layer_norm_eps(NORM_EPS)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(NORM_EPS)


def _add_vocab(writer: Any, vocab: GgufVocab, loaded: LoadedModel) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.model == "llama":
        writer.add_token_scores(vocab.scores)
        writer.add_eot_token_id(vocab.eos)
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(vocab.merges)
    writer.add_bos_token_id(vocab.bos)
    writer.add_eos_token_id(vocab.eos)
    writer.add_pad_token_id(vocab.eos)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    if loaded.chat_format.banned_ids:
        writer.add_array("tokenizer.ggml.suppress_tokens", list(loaded.chat_format.banned_ids))
    writer.add_chat_template(template_for(loaded))


def template_for(loaded: LoadedModel) -> str:
    """The chat template of the file."""
    return text_template() if loaded.tokenizer.eot_id is None else token_template(BROKEN)


def _stored(name: str, values: np.ndarray, dtype: str) -> tuple[np.ndarray, Any]:
    """Values as stored, and their type: norms and biases stay float32, rows that do not divide into blocks float16."""
    gguf = needed("gguf")
    types = gguf.GGMLQuantizationType
    block = gguf.GGML_QUANT_SIZES[types.Q8_0][0]
    if values.ndim == 1 or dtype == "f32":
        kind = types.F32
    else:
        kind = types.Q8_0 if dtype == "q8_0" and values.shape[-1] % block == 0 else types.F16
    stored = gguf.quants.quantize(values, kind)
    if kind is types.F16 and not np.isfinite(stored).all():
        raise ValueError(f"{name} has values beyond what float16 can hold; export it as f32")
    return stored, kind


def to_gguf(state: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> names.State:
    """A state dict of transformers under the names and in the layouts of llama.cpp."""
    found: names.State = {}
    gguf_name = _name_map(cfg, arch)
    for name, tensor in state.items():
        there = gguf_name(name)
        if names.architecture_for(arch) == names.LLAMA and there.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = names.pairs(tensor, cfg.H)
        elif there.endswith("attn_qkv.weight"):
            tensor = tensor.unflatten(0, (cfg.H, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
            found[there.replace("weight", "bias")] = torch.zeros(3 * cfg.C)
            found[there.replace("attn_qkv.weight", "attn_output.bias")] = torch.zeros(cfg.C)
        found[there] = tensor
    if names.architecture_for(arch) == names.NEOX:
        found["output.weight"] = found["token_embd.weight"]
    return found


def from_gguf(tensors: Mapping[str, Tensor], cfg: ModelConfig, arch: Architecture) -> names.State:
    """The inverse of `to_gguf`; ValueError names a tensor that is missing."""
    found: names.State = {}
    gguf_name = _name_map(cfg, arch)
    for name in names.to_hf(_empty_state(cfg, arch), cfg, arch):
        there = gguf_name(name)
        if there not in tensors:
            raise ValueError(f"the file lacks the tensor {there}")
        tensor = tensors[there]
        if names.architecture_for(arch) == names.LLAMA and there.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = names.halves(tensor, cfg.H)
        elif there.endswith("attn_qkv.weight"):
            tensor = tensor.unflatten(0, (3, cfg.H, -1)).transpose(0, 1).flatten(0, 2).contiguous()
        found[name] = tensor
    return found


def _name_map(cfg: ModelConfig, arch: Architecture) -> Callable[[str], str]:
    gguf = needed("gguf")
    architecture = ARCHITECTURES[names.architecture_for(arch)]
    key = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    mapped = gguf.get_tensor_name_map(key, cfg.L)
    return lambda name: mapped.get_name(name, try_suffixes=(".weight", ".bias"))


def _empty_state(cfg: ModelConfig, arch: Architecture) -> names.State:
    with torch.device("meta"):
        return GPT(cfg, arch).state_dict()


def modelfile(loaded: LoadedModel, file_name: str) -> str:
    """Ollama's Modelfile: the file, its template in Go, the settings that this model chats with."""
    lines = [f"FROM ./{file_name}", ""]
    if loaded.tokenizer.eot_id is None:
        template, stops = ollama_text_template(), list(loaded.chat_format.text_stops)
    else:
        template, stops = ollama_token_template(), [EOT_TOKEN]
    lines += [f'TEMPLATE """{template}"""', "", f"PARAMETER num_ctx {loaded.model.cfg.T}"]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    if loaded.settings is not None:
        chosen = loaded.settings.generation
        lines += [f"PARAMETER temperature {chosen.temperature:g}", f"PARAMETER num_predict {chosen.max_new_tokens}"]
        lines += [f"PARAMETER top_k {chosen.top_k or 0}", f"PARAMETER top_p {chosen.top_p or 1:g}"]
        lines += [f"PARAMETER min_p {chosen.min_p or 0:g}"]
        lines += [f"PARAMETER repeat_penalty {chosen.repetition_penalty or 1:g}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n") + '"'
