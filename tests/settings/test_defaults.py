"""The defaults that the specification documents."""

from __future__ import annotations

from typing import Any

from niels_gpt.config import ModelConfig
from niels_gpt.settings import default_settings, resolve_settings

PHASE_DEFAULTS = {  # of both; what differs has a test of its own
    **{"seed": 42, "micro_B": 16, "accum_steps": 1, "eval_every": 200, "eval_steps": 50, "eval_batches": None},
    **{"micro_B_eval": None, "log_every": 50, "ckpt_every": 1000, "optimizer": "adamw", "betas": (0.9, 0.95)},
    **{"eps": 1e-8, "decay_norm_and_bias": True, "decay_embeddings": True, "grad_clip": 1.0, "amp": "auto"},
    **{"amp_dtype": "fp16", "activation_checkpointing": False, "save_best": True, "best_metric_weights": None},
}
DOCUMENTED: dict[str, Any] = {
    "tokenizer": {
        "type": "bpe",  # published: unigram
        "model_path": "artifacts/tokenizer/v2/spm.model",
        "vocab_size": 16000,
        "tokenizer_sha256": None,
        "expected_special_token_ids": {"sys": 3, "usr": 4, "asst": 5, "eot": 6},
    },
    "model": {
        **{"V": 16000, "T": 512, "C": 384, "L": 8, "H": 6, "d_ff": 1152, "dropout": 0.1, "rope_theta": 10000.0},
        **{"norm_type": "rmsnorm", "mlp_type": "swiglu", "attention": {"use_kv_cache": True}},
    },
    "data": {
        "caches": {
            "pretrain_token_cache": "data/cache/pretrain",
            "sft_token_cache": "data/cache/sft",
            "streams_token_cache": "data/cache/streams",
        },
        "mix_pretrain": {"fineweb_edu": 0.7, "wikitext": 0.2, "roam": 0.1},
        "mix_sft": {"primer": 0.1, "oasst1": 0.7, "dolly15k": 0.2},
        "val_pretrain_source": "wikitext",
        "val_sft_source": "sft",
        "allow_missing_idx": False,
        "wikitext": {"dataset_id": "wikitext", "config": "wikitext-103-raw-v1", "val_split": "validation"},
        "fineweb_edu": {"dataset_id": "HuggingFaceFW/fineweb-edu", "name": "CC-MAIN-2024-10", "split": "train"},
        "dolly": {"dataset_id": "databricks/databricks-dolly-15k", "include_system": False, "shuffle": False},
        "oasst1": {"dataset_id": "OpenAssistant/oasst1", "english_only": True, "max_messages": 32},
        "roam": {"root_dir": "data/.roam-data", "glob_pattern": "**/*.md", "val_frac": 0.1, "split_seed": 42},
        "primer": {"path": "data/primer.txt", "delimiter": "\n\n<dialogue>\n\n", "val_frac": 0.1, "seed": 42},
    },
    "training": {
        "pretrain": {
            **PHASE_DEFAULTS,
            **{"total_steps": 17000, "base_lr": 3e-4, "warmup_steps": 340, "min_lr": 3e-5, "weight_decay": 0.1},
            "best_metric": "pretrain_val_loss",
        },
        "sft": {
            **PHASE_DEFAULTS,
            **{"total_steps": 1889, "base_lr": 1e-4, "warmup_steps": 189, "min_lr": 1e-5, "weight_decay": 0.05},
            "best_metric": "sft_val_loss",
        },
    },
    "sft_format": {
        "include_eot_in_loss": True,
        "pack_sequences": True,
        "ban_role_tokens_during_generation": True,
    },
    "generation": {
        **{"max_new_tokens": 256, "temperature": 0.9, "top_k": 50, "top_p": None, "repetition_penalty": None},
        **{"stop_token_id": None, "banned_token_ids": None},
    },
    "benchmark": {
        **{"candidate_T": (512, 1024), "checkpointing_modes": (False, True), "timeout_s": 20.0},
        **{"steps_warmup": 2, "steps_measure": 10, "max_micro_B": 256, "seed": 42},
    },
    "reproducibility": {
        **{"torch_num_threads": None, "torch_matmul_precision": None, "dataset_shuffle_buffer_size": 10000},
    },
}


def of_the_same_names(ours: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """What `ours` has at every place of `named`; a mix is one value."""
    return {
        name: of_the_same_names(ours[name], value)
        if isinstance(value, dict) and not name.startswith("mix_")
        else ours[name]
        for name, value in named.items()
    }


def test_the_documented_defaults() -> None:
    """All that the specification lists and that has an effect."""
    assert of_the_same_names(default_settings().model_dump(), DOCUMENTED) == DOCUMENTED
    assert resolve_settings("pretrain").model_cfg == ModelConfig(16000, 512, 384, 8, 6, 1152, 0.1, 10000.0)


def test_the_phases_differ_where_documented_and_nowhere_else() -> None:
    training = default_settings().training
    pretrain, sft = training.pretrain.model_dump(), training.sft.model_dump()
    assert {k: (pretrain[k], sft[k]) for k in pretrain if pretrain[k] != sft[k]} == {
        "total_steps": (17000, 1889),
        "base_lr": (3e-4, 1e-4),
        "warmup_steps": (340, 189),
        "min_lr": (3e-5, 1e-5),
        "weight_decay": (0.1, 0.05),
        "best_metric": ("pretrain_val_loss", "sft_val_loss"),
        "sample_prompt": ("Once upon a time", "what is your name?"),
    }
