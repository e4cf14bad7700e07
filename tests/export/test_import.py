"""From Hugging Face folders to checkpoints: the same function, to the bit where we exported it, or the exact reason."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from niels_gpt import files
from niels_gpt.checkpoint import load_checkpoint, load_model
from niels_gpt.cli import main
from niels_gpt.export import import_cli
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


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, which must divide num_attention_heads, 4"),
        ({"num_key_value_heads": [1]}, "num_key_value_heads is [1], which must divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, which must divide"),
        ({"num_attention_heads": 3}, "hidden_size is 32, which must be a multiple of num_attention_heads, 3"),
        ({"num_hidden_layers": True}, "no whole number for num_hidden_layers"),
        ({"rope_theta": None}, "rope_theta is null, which must be a number above 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, 'rope_theta is "x", which must be a number above 0'),
        ({"rotary_emb_base": 0}, "rotary_emb_base is 0, which must be a number above 0"),
        ({"rope_theta": 10**400}, "000, which must be a number above 0"),
        ({"rope_scaling": True}, "rope_scaling is true, which must be an object, or null"),
        ({"partial_rotary_factor": [1]}, "the share of a head that is rotated is [1], this model has 1.0"),
    ],
)
def test_impossible_values_name_their_key(tmp_path, capsys, values, reason):
    files.write_json(tmp_path / "llama/config.json", {**LLAMA, "model_type": "llama", **values})
    assert main(["import", "hf", str(tmp_path / "llama"), "--out", str(tmp_path / "a.pt")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path / 'llama'} cannot become a checkpoint: ")
    assert reason in error and "\n" not in error


def test_weights_that_no_model_can_have_are_named(tmp_path, capsys, monkeypatch):
    folder = llama_folder(tmp_path / "llama")
    whole, out = load_file(tmp_path / "llama/model.safetensors"), str(tmp_path / "a.pt")
    name = "model.layers.1.mlp.up_proj.weight"
    for weights, reason in (
        (torch.ones_like(whole[name], dtype=torch.int8), f"its weights {name} are of type int8: quantised weights"),
        (whole[name] / 0, f"its weights {name} hold NaN or infinity"),
    ):
        save_file({**whole, name: weights}, tmp_path / "llama/model.safetensors", metadata={"format": "pt"})
        assert main(["import", "hf", folder, "--out", out]) == 1
        assert f"{folder} cannot become a checkpoint: {reason}" in capsys.readouterr().err
    save_file(whole, tmp_path / "llama/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(import_cli, "load_with_transformers", lambda *_, **__: ZeroLogits())
    assert main(["import", "hf", folder, "--out", out]) == 1
    assert "was not imported: the logits of transformers and of the model made here differ" in capsys.readouterr().err
    assert names_in(tmp_path) == ["llama"]


class ZeroLogits(torch.nn.Module):
    """Another model than the folder's."""

    def forward(self, ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, LLAMA["vocab_size"]))


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
