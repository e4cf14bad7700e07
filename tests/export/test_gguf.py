"""GGUF files: they hold the model, llama.cpp's reading of text is ours, and a wrong file never gets its name."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import gguf
import pytest
import sentencepiece

from niels_gpt.checkpoint import load_model
from niels_gpt.cli import main
from niels_gpt.export import gguf_file, hf, names
from niels_gpt.export.gguf_vocab import LlamaCppReader, vocab_of
from niels_gpt.settings import default_settings, validate_overrides
from niels_gpt.special_tokens import EOT_TOKEN, SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, train_tokenizer
from tests.export.models import ARCHITECTURES, names_in, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer):
    """Checkpoints by kind: v1 of bytes, the others with the tiny tokenizer; `v2` has more ids than that."""
    root = tmp_path_factory.mktemp("gguf")

    def path(kind):
        found = root / f"{kind}.pt"
        if not found.is_file():
            model = None if kind == "v1" else tiny_tokenizer.model_bytes
            save(found, ARCHITECTURES[kind], model, V=520 if kind == "v2" else 512, T=64)
        return str(found)

    return path


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_all_types_of_a_new_model(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("niels_gpt.export.llama_cpp.python_with_llama_cpp", lambda: None)
    out = tmp_path / "out"
    assert main(["export", "gguf", "--ckpt", checkpoint("new"), "--out", str(out), "--dtype", "f32", "q8_0"]) == 0
    said = capsys.readouterr().out
    assert "niels-gpt-f32.gguf: exact weights" in said and "not by llama.cpp itself" in said
    assert names_in(out) == ["Modelfile", "export.json", "niels-gpt-f32.gguf", "niels-gpt-q8_0.gguf"]
    assert json.loads((out / "export.json").read_text())["files"]["niels-gpt-q8_0.gguf"]["dtype"] == "q8_0"
    fields = fields_of(out / "niels-gpt-f32.gguf")
    assert fields["general.architecture"] == "qwen3" and fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.eos_token_id"] == 6 and fields["tokenizer.ggml.suppress_tokens"] == [3, 4, 5]
    assert not {"<s>", "</s>", "<unk>"} & set(fields["tokenizer.ggml.tokens"])  # they occur in ordinary text
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./niels-gpt-f32.gguf\n") and f'PARAMETER stop "{EOT_TOKEN}"' in modelfile
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "niels-gpt-q8_0.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"


def test_published_architecture_with_spare_ids(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert main(["export", "gguf", "--ckpt", checkpoint("v2"), "--out", str(out), "--dtype", "f16"]) == 0
    fields = fields_of(out / "niels-gpt-f16.gguf")
    assert fields["general.architecture"] == "llama" and len(fields["tokenizer.ggml.tokens"]) == 520


def test_byte_models_say_that_llama_cpp_approximates(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "gguf", "--ckpt", checkpoint("v1"), "--out", str(out)]) == 1
    assert "--approximate-gelu" in capsys.readouterr().err and names_in(tmp_path) == []
    assert main(["export", "gguf", "--ckpt", checkpoint("v1"), "--out", str(out), "--approximate-gelu"]) == 0
    assert fields_of(out / "niels-gpt-f32.gguf")["general.architecture"] == "gptneox"
    assert 'PARAMETER stop "\\nuser: "' in (out / "Modelfile").read_text()


def test_a_unigram_tokenizer_is_refused_with_the_reason(tmp_path, tiny_tokenizer, capsys):
    text = [" ".join(tiny_tokenizer.piece(i) for i in range(263, 512)) * 3]
    unigram = load_tokenizer(train_tokenizer(text, tmp_path / "unigram", vocab_size=400, model_type="unigram"))
    checkpoint = save(tmp_path / "a.pt", ARCHITECTURES["new"], unigram.model_bytes, T=32)
    assert main(["export", "gguf", "--ckpt", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "it is unigram, and llama.cpp's unigram knows no byte fallback" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_normalising_tokenizer_is_refused_with_the_reason(tmp_path):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_writer=writer,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        control_symbols=list(SPECIAL_TOKENS.values()),
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="nmt_nfkc normalisation"):
        vocab_of(SentencePieceTokenizer.from_bytes(writer.getvalue()), 310)


@pytest.mark.parametrize("where", [-5, 0.4, 0.02])
def test_a_damaged_file_never_gets_its_name(checkpoint, tmp_path, monkeypatch, capsys, where):
    write = gguf_file.write_gguf

    def write_and_damage(loaded, path, dtype):
        write(loaded, path, dtype)
        content = bytearray(path.read_bytes())
        content[where if isinstance(where, int) else int(len(content) * where)] ^= 0x10
        path.write_bytes(content)

    monkeypatch.setattr(gguf_file, "write_gguf", write_and_damage)
    assert main(["export", "gguf", "--ckpt", checkpoint("new"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert names_in(tmp_path) == []


def test_wrong_metadata_is_noticed(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_file, "NORM_EPS", 1e-3)
    assert main(["export", "gguf", "--ckpt", checkpoint("new"), "--out", str(tmp_path / "out")]) == 1
    assert "epsilon" in capsys.readouterr().err


def test_out_names_a_folder(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "gguf", "--ckpt", checkpoint("new"), "--out", str(tmp_path / "x.gguf")])
    assert stopped.value.code == 2 and "names a folder" in capsys.readouterr().err


def test_the_reading_of_llama_cpp_joins_best_scores_first_and_leftmost(tiny_tokenizer):
    reader = LlamaCppReader(vocab_of(tiny_tokenizer, 512))
    for text in ("", " ", "hello  world\n", "日本 🙂", "aaaaaaa", "<s></s><unk><0x0A>"):
        assert reader.encode(text) == tiny_tokenizer.encode(text)
    assert reader.encode(f"a{EOT_TOKEN}", parse_special=True)[-1] == 6
    assert 6 not in reader.encode(f"a{EOT_TOKEN}")
    assert LlamaCppReader(vocab_of(ByteTokenizer(), 256)).encode("é") == [0xC3, 0xA9]


def test_wrong_row_order_is_noticed(checkpoint, tmp_path, monkeypatch, capsys):
    """Values and shapes are right, but in the layout of another architecture."""
    to_gguf = gguf_file.to_gguf

    def swapped(state, cfg, arch):
        return {
            k: names.pairs(t, cfg.H) if k.endswith("attn_q.weight") else t for k, t in to_gguf(state, cfg, arch).items()
        }

    monkeypatch.setattr(gguf_file, "to_gguf", swapped)
    assert main(["export", "gguf", "--ckpt", checkpoint("new"), "--out", str(tmp_path / "out")]) == 1
    assert "attn_q.weight is not the model's" in capsys.readouterr().err


def test_the_modelfile_carries_the_context_and_the_settings(checkpoint):
    loaded = load_model(checkpoint("new"), device="cpu")
    plain = gguf_file.modelfile(loaded, "a.gguf")
    assert "PARAMETER num_ctx 64" in plain and "temperature" not in plain  # this checkpoint records no settings
    chosen = gguf_file.modelfile(replace(loaded, settings=default_settings()), "a.gguf")
    assert "PARAMETER temperature 0.9\n" in chosen and "PARAMETER top_k 50\n" in chosen


def test_every_way_to_sample_goes_along(checkpoint):
    settings = validate_overrides({"generation": {"min_p": 0.05, "repetition_penalty": 1.25, "top_p": 0.5}})
    loaded = replace(load_model(checkpoint("new"), device="cpu"), settings=settings)
    lines = gguf_file.modelfile(loaded, "a.gguf").splitlines()
    assert {"PARAMETER min_p 0.05", "PARAMETER repeat_penalty 1.25", "PARAMETER top_p 0.5"} <= set(lines)
    found = hf.generation_config(loaded)
    assert (found["min_p"], found["repetition_penalty"], found["top_p"]) == (0.05, 1.25, 0.5)
