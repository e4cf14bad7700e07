"""Writing a Hugging Face folder that plain transformers loads: no code of this project is needed to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt import files
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.config import Architecture, ModelConfig
from niels_gpt.export import hf_tokenizer, names
from niels_gpt.export.needs import needed
from niels_gpt.export.samples import CONVERSATIONS, STRINGS
from niels_gpt.export.spm import SENTINEL_ID, read_spm
from niels_gpt.export.templates import MARK, text_template, token_template
from niels_gpt.model.blocks import NORM_EPS
from niels_gpt.special_tokens import EOT_TOKEN
from niels_gpt.tokenizer import SentencePieceTokenizer, Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_CLASSES = {names.QWEN3: "Qwen3ForCausalLM", names.LLAMA: "LlamaForCausalLM", names.NEOX: "GPTNeoXForCausalLM"}


def write_hf(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Fill `folder` (there, empty) with config, weights, tokenizer, chat template and a README.

    ValueError: no plain architecture, or no tokenizer.json, represents this model; or a weight does not fit the dtype.
    """
    cfg, arch = loaded.model.cfg, loaded.model.arch
    config = hf_config(cfg, arch, dtype)
    tokenizer_json, tokenizer_config, template = tokenizer_parts(loaded.tokenizer, cfg.T)
    weights = rounded(names.to_hf(loaded.model.state_dict(), cfg, arch), DTYPES[dtype])
    content = needed("safetensors.torch").save(weights, metadata={"format": "pt"})
    files.write_bytes(folder / "model.safetensors", content)
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "generation_config.json", generation_config(loaded))
    files.write_text(folder / "tokenizer.json", tokenizer_json)
    files.write_json(folder / "tokenizer_config.json", tokenizer_config)
    files.write_text(folder / "chat_template.jinja", template)
    if isinstance(loaded.tokenizer, SentencePieceTokenizer):
        files.write_bytes(folder / "spm.model", loaded.tokenizer.model_bytes)
    files.write_text(folder / "README.md", _readme(loaded, config, dtype))


def hf_config(cfg: ModelConfig, arch: Architecture, dtype: str) -> dict[str, Any]:
    """`config.json`; the rotary base under the name that both old and new transformers read."""
    model_type = names.architecture_for(arch)
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [_CLASSES[model_type]],
        "torch_dtype": _DTYPE_NAMES[dtype],
        "vocab_size": cfg.V,
        "max_position_embeddings": cfg.T,
        "hidden_size": cfg.C,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.H,
        "intermediate_size": cfg.d_ff,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if model_type == names.NEOX:
        return config | {
            "hidden_act": "gelu",  # the exact one
            "layer_norm_eps": NORM_EPS,
            "use_parallel_residual": False,
            "rotary_pct": 1.0,
            "rotary_emb_base": cfg.rope_theta,
            "hidden_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "num_key_value_heads": cfg.H,
        "head_dim": cfg.C // cfg.H,
        "rope_theta": cfg.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return config | ({"mlp_bias": arch.mlp_bias} if model_type == names.LLAMA else {"use_sliding_window": False})


def generation_config(loaded: LoadedModel) -> dict[str, Any]:
    """`generation_config.json`: the settings this model chats with; ids that open turns are never sampled."""
    found: dict[str, Any] = {"bos_token_id": None}
    eot = loaded.tokenizer.eot_id
    if eot is not None:
        found |= {"eos_token_id": eot, "pad_token_id": eot}
    if loaded.chat_format.banned_ids:
        found["suppress_tokens"] = list(loaded.chat_format.banned_ids)
    if loaded.settings is not None:
        chosen = loaded.settings.generation
        found |= {"do_sample": chosen.temperature > 0, "max_new_tokens": chosen.max_new_tokens}
        if chosen.temperature > 0:
            found |= {"temperature": chosen.temperature, "top_k": chosen.top_k or 0, "top_p": chosen.top_p or 1.0}
            found |= {"min_p": chosen.min_p} if chosen.min_p else {}
        found |= {"repetition_penalty": chosen.repetition_penalty} if chosen.repetition_penalty else {}
    return found


def tokenizer_parts(tokenizer: Tokenizer, context: int) -> tuple[str, dict[str, Any], str]:
    """tokenizer.json, tokenizer_config.json and the chat template of a tokenizer."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "padding_side": "left",
    }
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return hf_tokenizer.byte_json(), config, text_template()
    spm = read_spm(tokenizer.model_bytes)
    content = hf_tokenizer.bpe_json(spm) if spm.is_lossless else hf_tokenizer.unigram_json(spm)
    config |= {"eos_token": EOT_TOKEN, "pad_token": EOT_TOKEN}
    return content, config, token_template(MARK + SENTINEL_ID)


def rounded(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """CPU copies in `dtype`; ValueError names a tensor that does not fit in its range."""
    found = {}
    for name, tensor in state.items():
        found[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"{name} has values beyond what {dtype} can hold; export it as f32")
    return found


_README = """---
library_name: transformers
pipeline_tag: text-generation
---

# A model made with niels-gpt

{parameters:,} parameters, context {context}, `{model}`, {dtype}. Exported from `{source}` (step {step}) and compared
with the original before it got its name: logits within 1e-4 in float32, token ids on {strings:,} strings, the chat
template on {conversations} conversations.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello!"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids)[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
```

## What to know

{notes}
"""

_TOKEN_NOTES = """\
- Through the chat template no text becomes a control token, whatever a user types. Text given to the tokenizer itself
  is another matter: the tokenizer.json format cannot store that control tokens in it are to be read as text, so
  `tokenizer(text)` turns a typed `{eot}` into its id. For text that you did not write, call
  `tokenizer(text, split_special_tokens=True)`.
- No token is added at the beginning of a text, as in training.
- `spm.model` is the SentencePiece model itself; its ids 0 to 2 (`<unk>`, `<s>`, `</s>`, which training never uses) have
  other names in tokenizer.json, since those occur in ordinary text."""

_TEXT_NOTES = """\
- Ids are UTF-8 bytes; there are no control tokens. A reply ends where the model starts another line with a role: pass
  `stop_strings=["\\nuser: ", "\\nsystem: ", "\\nassistant: "]` and `tokenizer=tokenizer` to `generate`."""


def _readme(loaded: LoadedModel, config: dict[str, Any], dtype: str) -> str:
    notes = _TOKEN_NOTES.format(eot=EOT_TOKEN) if loaded.tokenizer.eot_id is not None else _TEXT_NOTES
    return _README.format(
        parameters=loaded.model.num_parameters,
        context=loaded.model.cfg.T,
        model=config["architectures"][0],
        dtype=_DTYPE_NAMES[dtype],
        source=loaded.checkpoint_path.name,
        step=loaded.step,
        strings=STRINGS,
        conversations=CONVERSATIONS,
        name="path/to/this/folder",
        notes=notes,
    )
