"""From Hugging Face folders to checkpoints: the same function, to the bit where we exported it, or the exact reason."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from niels_gpt.checkpoint import load_checkpoint, load_model
from niels_gpt.cli import main
from niels_gpt.export.import_hf import read_hf, unsupported
from tests.export.models import ARCHITECTURES, names_in, save

transformers.logging.disable_progress_bar()  # it writes to stderr, where errors are looked for

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = {"vocab_size": 64, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **SHAPE}


def llama_folder(folder, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["new", "v1", "v2"])
def test_a_round_trip_gives_the_same_bits(tmp_path, tiny_tokenizer, kind):
    tokenizer_model = None if kind == "v1" else tiny_tokenizer.model_bytes
    source = save(tmp_path / "a.pt", ARCHITECTURES[kind], tokenizer_model, T=48)
    assert main(["export", "hf", "--ckpt", str(source), "--out", str(tmp_path / "hf")]) == 0
    assert main(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "b.pt")]) == 0
    before, after = (load_checkpoint(tmp_path / name, device="cpu")["model_state"] for name in ("a.pt", "b.pt"))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    found = load_model(tmp_path / "b.pt", device="cpu")
    assert found.model.arch == ARCHITECTURES[kind] and found.tokenizer.kind == (
        "byte" if kind == "v1" else "sentencepiece"
    )


@pytest.mark.parametrize("shared", [4, 2, 1])
def test_foreign_llama_with_and_without_grouped_queries(tmp_path, capsys, shared):
    folder = llama_folder(tmp_path / "llama", num_key_value_heads=shared)
    assert main(["import", "hf", folder, "--out", str(tmp_path / "a.pt")]) == 0
    said = capsys.readouterr().out
    assert ("copied to 4" in said) == (shared != 4) and "does not chat" in said
    found = read_hf(tmp_path / "llama")
    assert found.state["blocks.0.attn.qkv.weight"].shape == (96, 32)


def test_sharded_weights_and_an_untied_head_that_is_equal(tmp_path, capsys):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": False}))
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    assert main(["import", "hf", str(tmp_path / "llama"), "--out", str(tmp_path / "a.pt")]) == 0
    assert "tied from now on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"tie_word_embeddings": False}, "untied head"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, this model has 1e-05"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 16}, "head_dim is 16, this model has 8"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling is 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_is_not_supported_is_said_exactly(tmp_path, capsys, changes, reason):
    folder = llama_folder(tmp_path / "llama", **changes)
    assert main(["import", "hf", folder, "--out", str(tmp_path / "a.pt")]) == 1
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error
    assert names_in(tmp_path) == ["llama"]


def test_all_reasons_are_named_at_once():
    found = unsupported({**LLAMA, "model_type": "llama", "rms_norm_eps": 1e-6, "attention_bias": True})
    assert len(found) == 2
    assert unsupported({"model_type": "gpt2"}) == ["model_type 'gpt2' is not supported (llama, qwen3 and gpt_neox are)"]


def test_folders_that_are_not_whole(tmp_path, capsys):
    for spoil, reason in (
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'), "in which file each"),
        (lambda f: _change(f, num_hidden_layers=3), "lacks model.layers.2"),
        (lambda f: _change(f, intermediate_size=40), "the config asks for"),
        (lambda f: _change(f, vocab_size=None), "vocab_size"),
    ):
        folder = tmp_path / reason.replace(" ", "_")
        llama_folder(folder)
        spoil(folder)
        assert main(["import", "hf", str(folder), "--out", str(tmp_path / "a.pt")]) == 1, reason
        error = capsys.readouterr().err.strip()
        assert reason in error and "\n" not in error
    assert not (tmp_path / "a.pt").exists()


def _change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_checkpoint_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("precious")
    folder = llama_folder(tmp_path / "llama")
    assert main(["import", "hf", folder, "--out", str(tmp_path / "a.pt")]) == 1
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "a.pt").read_text() == "precious"
