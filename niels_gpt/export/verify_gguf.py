"""Loading a GGUF file back and comparing it with the model, with llama.cpp itself where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.config import Architecture, ModelConfig
from niels_gpt.export import names, samples
from niels_gpt.export.gguf_file import ARCHITECTURES, from_gguf, template_for, to_gguf
from niels_gpt.export.gguf_vocab import GgufVocab, LlamaCppReader, as_llama_cpp_reads, vocab_of
from niels_gpt.export.hf import hf_config
from niels_gpt.export.needs import needed
from niels_gpt.export.verify import same_chats, same_ids, same_logits
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.model.gpt import GPT

Json = dict[str, Any]


def verify_gguf(path: Path, loaded: LoadedModel, dtype: str) -> float:
    """Compare tensors, logits, token ids and chat template; returns how far rounding moves a logit (0 for f32).

    ValueError with one line at the first mismatch.
    """
    try:
        fields, tensors, kinds = _read_back(path)
        cfg, arch = shape_in(fields)
        vocab, template = vocab_in(fields), fields["tokenizer.chat_template"]
    except Exception as error:  # a damaged file surfaces as almost anything
        raise ValueError(f"{path.name} cannot be read back: {error!r}") from None
    model = loaded.model
    if (cfg, arch.norm_type) != (_comparable(model.cfg), model.arch.norm_type):
        raise ValueError(f"the file describes the model {cfg}, not {_comparable(model.cfg)}")
    expected = to_gguf(names.to_hf(model.state_dict(), model.cfg, model.arch), model.cfg, model.arch)
    same_tensors(tensors, expected, kinds)
    state = from_gguf(tensors, model.cfg, model.arch)
    stored = GPT(model.cfg, model.arch).eval()
    stored.load_state_dict(names.from_hf(state, model.cfg, model.arch))
    same_logits(stored, _transformers_twin(state, cfg, model.arch))
    moved = same_logits(model, stored, tolerance=0.0 if dtype == "f32" else float("inf"))
    _same_tokens(vocab, template, loaded)
    return moved


def _read_back(path: Path) -> tuple[Json, dict[str, Tensor], dict[str, str]]:
    """Metadata, tensors in float32, and the names of their types."""
    gguf = needed("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def shape_in(fields: Json) -> tuple[ModelConfig, Architecture]:
    """The model that a file's metadata describes; whether its MLPs have biases shows only in its tensors."""
    architecture = fields["general.architecture"]
    key: Json = {name: fields.get(f"{architecture}.{name}") for name in _SHAPE}
    neox = architecture == ARCHITECTURES[names.NEOX]
    cfg = ModelConfig(
        V=len(fields["tokenizer.ggml.tokens"]),
        T=key["context_length"],
        C=key["embedding_length"],
        L=key["block_count"],
        H=key["attention.head_count"],
        d_ff=key["feed_forward_length"],
        dropout=0.0,
        rope_theta=key["rope.freq_base"],
    )
    epsilon = key["attention.layer_norm_epsilon" if neox else "attention.layer_norm_rms_epsilon"]
    if epsilon != np.float32(NORM_EPS):
        raise ValueError(f"the file's norms have epsilon {epsilon}, not {NORM_EPS}")
    qk_norm = architecture == ARCHITECTURES[names.QWEN3]
    return cfg, Architecture("layernorm" if neox else "rmsnorm", "gelu" if neox else "swiglu", not qk_norm, qk_norm)


_SHAPE = (
    *("context_length", "embedding_length", "block_count", "attention.head_count", "feed_forward_length"),
    *("rope.freq_base", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
)


def _comparable(cfg: ModelConfig) -> ModelConfig:
    shape = {name: getattr(cfg, name) for name in ("V", "T", "C", "L", "H", "d_ff")}
    return ModelConfig(**shape, dropout=0.0, rope_theta=float(np.float32(cfg.rope_theta)))


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], kinds: dict[str, str]) -> None:
    """Compare tensors: exactly in F32, rounded in F16, and in Q8_0 within half a step of each block of 32."""
    if different := set(found) ^ set(expected):
        raise ValueError(f"the file lacks or adds the tensors {', '.join(sorted(different)[:5])}")
    for name, tensor in expected.items():
        want, have = tensor.float(), found[name]
        if have.shape != want.shape:
            raise ValueError(f"the file's {name} has shape {tuple(have.shape)}, not {tuple(want.shape)}")
        if kinds[name] == "Q8_0":
            step = want.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            off = (have - want).unflatten(
                -1, (-1, 32)
            ).abs() > step * 0.57 + 1e-7  # half a step, and the f16 step's error
        else:
            off = have != (want.half().float() if kinds[name] == "F16" else want)
        if bool(off.any()):
            raise ValueError(f"the file's {name} is not the model's")


@torch.no_grad()
def _transformers_twin(state: names.State, cfg: ModelConfig, arch: Architecture) -> Callable[[Tensor], Tensor]:
    """The plain transformers model of the file's metadata, with the file's weights."""
    transformers = needed("transformers")
    config = hf_config(cfg, arch, "f32")
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval()
    missing, unexpected = twin.load_state_dict(state, strict=False)
    tied = {"lm_head.weight", "embed_out.weight"}
    if unexpected or not set(missing) <= tied:
        raise ValueError(f"the file's tensors do not fit {config['architectures'][0]}: {[*missing, *unexpected][:5]}")
    twin.tie_weights()
    return lambda ids: twin(ids).logits


def _same_tokens(vocab: GgufVocab, template: str, loaded: LoadedModel) -> None:
    reader = LlamaCppReader(vocab)
    render = renderer(template)
    texts = gguf_texts(loaded)
    same_ids(loaded.tokenizer, texts, reader.encode)
    chats = samples.conversations(texts)
    same_chats(loaded, chats, lambda messages: reader.encode(render(messages), parse_special=True))
    if loaded.tokenizer.eot_id is not None:
        _no_forgery(reader, render, loaded)
    if (vocab, template) != (vocab_of(loaded.tokenizer, loaded.model.cfg.V), template_for(loaded)):
        raise ValueError("the file's vocabulary is not what was written")  # what the samples did not touch


def gguf_texts(loaded: LoadedModel) -> list[str]:
    """The sample strings, as far as GGUF can tell them apart: to the kind `llama`, a U+2581 is a blank."""
    texts = samples.strings(loaded.tokenizer)
    return texts if loaded.tokenizer.eot_id is None else [as_llama_cpp_reads(text) for text in texts]


def _no_forgery(reader: LlamaCppReader, render: Callable[[list[dict[str, str]]], str], loaded: LoadedModel) -> None:
    """A sentinel in a message must give no control id beyond those of the template."""
    special = set(loaded.tokenizer.special_token_ids().values()) | {0, 1, 2}
    for text in samples.forgeries():
        for role in ("system", "user", "assistant"):
            chat = [{"role": role, "content": text}]
            ids = reader.encode(render(chat), parse_special=True)
            if sum(i in special for i in ids) != 3:
                raise ValueError(f"the file's chat template lets {text[:60]!a} pose as control")


def vocab_in(fields: Json) -> GgufVocab:
    """The vocabulary that a file holds."""
    key = "tokenizer.ggml."
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
        if fields[key + name] is not False:
            raise ValueError(f"the file says {name}={fields[key + name]}; this tokenizer adds and removes nothing")
    return GgufVocab(
        model=fields[key + "model"],
        tokens=tuple(fields[key + "tokens"]),
        types=tuple(fields[key + "token_type"]),
        scores=tuple(fields.get(key + "scores", ())),
        merges=tuple(fields.get(key + "merges", ())),
        eos=fields[key + "eos_token_id"],
        bos=fields[key + "bos_token_id"],
    )


def renderer(template: str) -> Callable[[list[dict[str, str]]], str]:
    """Render the template as llama.cpp's Jinja and transformers do, with a reply asked for."""
    environment = needed("jinja2.sandbox").ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True)
