"""Hugging Face folders: plain transformers runs them as we do, and a wrong one never gets its name."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt.cache.folder import replacing_folder
from niels_gpt.checkpoint import load_model
from niels_gpt.cli import main
from niels_gpt.export import publishing, verify
from niels_gpt.infer.kv_cache import generate_ids_greedy_cached
from niels_gpt.special_tokens import EOT_TOKEN, SPECIAL_TOKENS, USR_TOKEN
from niels_gpt.unicode import BLANK
from tests.export.models import ARCHITECTURES, PROMPTS, names_in, save
from tests.reference import BUNDLE, needs_bundle

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """Export a model of each architecture once, by the command; v1 with bytes."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def export(kind: str) -> SimpleNamespace:
        if kind not in made:
            tokenizer_model = None if kind == "v1" else tiny_tokenizer.model_bytes
            checkpoint, folder = save(root / f"{kind}.pt", ARCHITECTURES[kind], tokenizer_model), root / kind
            assert main(["export", "hf", "--ckpt", str(checkpoint), "--out", str(folder)]) == 0
            made[kind] = SimpleNamespace(
                folder=folder,
                loaded=load_model(checkpoint, device="cpu"),
                tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
                model=transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
            )
        return made[kind]

    return export


@pytest.mark.parametrize("kind", ["new", "v1", "v2"])
def test_plain_transformers_generates_the_same_greedy_tokens(exported, kind):
    found = exported(kind)
    chosen = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    found.model.generation_config = chosen
    distinct = set()
    for prompt in PROMPTS[:: 1 if kind == "new" else 4]:
        chat = [{"role": "user", "content": prompt}]
        encoded = found.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = found.loaded.chat_format.encode_prompt(chat, context=192, max_new_tokens=NEW_TOKENS).ids
        assert encoded["input_ids"][0].tolist() == ids
        ours = generate_ids_greedy_cached(found.loaded.model, ids, max_new_tokens=NEW_TOKENS, eot_token_id=None)
        assert found.model.generate(**encoded)[0].tolist() == ours
        distinct |= set(ours[len(ids) :])
    assert len(distinct) > 10  # a model that repeats itself would hide every mistake


def test_the_folder_is_complete_and_needs_no_code_of_ours(exported):
    found = exported("new")
    assert names_in(found.folder) == [
        *("README.md", "chat_template.jinja", "config.json", "export.json", "generation_config.json"),
        *("model.safetensors", "spm.model", "tokenizer.json", "tokenizer_config.json"),
    ]
    config = json.loads((found.folder / "config.json").read_text())
    assert "auto_map" not in config and config["model_type"] == "qwen3"
    assert type(found.model).__name__ == "Qwen3ForCausalLM"
    assert type(exported("v1").model).__name__ == "GPTNeoXForCausalLM"
    assert type(exported("v2").model).__name__ == "LlamaForCausalLM"
    assert found.model.get_output_embeddings().weight is found.model.get_input_embeddings().weight


def test_the_end_of_a_turn_ends_generation_and_roles_are_never_sampled(exported):
    config = transformers.GenerationConfig.from_pretrained(exported("new").folder)
    assert (config.eos_token_id, config.suppress_tokens) == (6, [3, 4, 5])


_PARTS = st.sampled_from(
    [*SPECIAL_TOKENS.values(), EOT_TOKEN[:20], EOT_TOKEN[20:], "\ufdd0", BLANK, "<s>", "</s>", "a"]
)
_TEXTS = st.lists(st.one_of(_PARTS, st.text(max_size=5)), max_size=8).map("".join)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), _TEXTS), min_size=1, max_size=3))
def test_no_text_becomes_control_through_the_chat_template(exported, turns):
    found = exported("new")
    chat = [{"role": role, "content": text} for role, text in turns]
    ids = found.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(ids) == found.loaded.chat_format.encode_prompt(chat, context=10**9, max_new_tokens=1).ids


def test_what_tokenizer_json_cannot_store_is_as_the_readme_says(exported):
    found = exported("new")
    ours = found.loaded.tokenizer.encode(USR_TOKEN)
    assert found.tokenizer(USR_TOKEN)["input_ids"] == [4]
    assert found.tokenizer(USR_TOKEN, split_special_tokens=True)["input_ids"] == ours
    assert "split_special_tokens=True" in (found.folder / "README.md").read_text()


def test_unknown_roles_are_an_error(exported):
    for kind in ("new", "v1"):
        with pytest.raises(Exception, match="unknown role tool"):
            exported(kind).tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_16_bit_weights(exported, tmp_path, dtype):
    checkpoint = exported("new").folder.with_suffix(".pt")
    assert main(["export", "hf", "--ckpt", str(checkpoint), "--out", str(tmp_path / "out"), "--dtype", dtype]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]


def _tamper_weights(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def _tamper_merges(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    path.write_text(json.dumps(content))


def _tamper_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("replace(", "replace('a', 'b') | replace("))


def _tamper_json(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-9])


def _tamper_rare_piece(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))


def _tamper_epsilon(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.001'))


@pytest.mark.parametrize(
    "tamper, reason",
    [
        (_tamper_weights, "logits differ"),
        (_tamper_merges, "tokenizer reads"),
        (_tamper_template, "chat template reads"),
        (_tamper_epsilon, "logits differ"),
        (_tamper_json, "transformers cannot load"),
        (_tamper_rare_piece, "tokenizer"),
    ],
)
def test_a_wrong_export_never_gets_its_name(exported, tmp_path, monkeypatch, capsys, tamper, reason):
    checkpoint = exported("new").folder.with_suffix(".pt")
    write = publishing.write_hf

    def write_and_tamper(loaded, folder, dtype):
        write(loaded, folder, dtype)
        tamper(folder)

    monkeypatch.setattr(publishing, "write_hf", write_and_tamper)
    assert main(["export", "hf", "--ckpt", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert reason in error
    assert names_in(tmp_path) == []


def test_what_is_there_is_left_alone(exported, tmp_path, capsys):
    checkpoint = str(exported("new").folder.with_suffix(".pt"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert main(["export", "hf", "--ckpt", checkpoint, "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", "hf", "--ckpt", checkpoint, "--out", str(out), "--overwrite"]) == 1
    assert "something other than an export" in capsys.readouterr().err
    assert names_in(out) == ["mine.txt"]
    (out / "mine.txt").rename(out / publishing.RECORD)
    assert main(["export", "hf", "--ckpt", checkpoint, "--out", str(out), "--overwrite"]) == 0
    assert "model.safetensors" in names_in(out) and names_in(tmp_path) == ["out"]


def test_what_came_while_an_export_waited_is_left_alone(exported, tmp_path, monkeypatch, capsys):
    checkpoint, out = str(exported("new").folder.with_suffix(".pt")), tmp_path / "out"

    @contextmanager
    def after_another(target):
        out.mkdir()
        (out / publishing.RECORD).write_text("theirs")
        with replacing_folder(target) as folder:
            yield folder

    monkeypatch.setattr(publishing, "replacing_folder", after_another)
    assert main(["export", "hf", "--ckpt", checkpoint, "--out", str(out)]) == 1
    assert f"error: {out} is there already" in capsys.readouterr().err
    assert (out / publishing.RECORD).read_text() == "theirs" and names_in(tmp_path) == ["out"]


def test_an_export_into_the_folder_that_one_is_in_is_refused(exported, tmp_path, monkeypatch, capsys):
    checkpoint = str(exported("new").folder.with_suffix(".pt"))
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out, other in ((".", "niels-gpt-export"), ("..", "../niels-gpt-export"), ("../a", "../a/niels-gpt-export")):
        assert main(["export", "hf", "--ckpt", checkpoint, "--out", out, "--overwrite"]) == 1
        assert f"such as {other}\n" in capsys.readouterr().err
    assert names_in(tmp_path) == ["a"] and names_in(tmp_path / "a") == []


def test_ctrl_c_leaves_an_earlier_export_and_says_so(exported, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "verify_hf", stop)
    out = tmp_path / "out"
    flags = ["--ckpt", str(exported("new").folder.with_suffix(".pt")), "--out", str(out)]
    assert main(["export", "hf", *flags]) == 130 and not out.exists()
    out.mkdir()
    (out / publishing.RECORD).write_text("{}")
    assert main(["export", "hf", *flags, "--overwrite"]) == 130 and names_in(out) == [publishing.RECORD]
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; {out} is as it was"


def test_a_missing_package_names_the_extra(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    checkpoint = str(exported("new").folder.with_suffix(".pt"))
    assert main(["export", "hf", "--ckpt", checkpoint, "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'niels-gpt[export]'" in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["export", "hf", "--ckpt", str(tmp_path / "no.pt"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == f"error: there is no checkpoint at {tmp_path / 'no.pt'}"


def test_logits_that_are_not_numbers_are_a_mismatch(exported):
    ours = exported("new").loaded.model
    with pytest.raises(ValueError, match="differ by nan"):
        verify.same_logits(ours, lambda ids: ours(ids) * float("nan"))


@needs_bundle
def test_published_subword_models(tmp_path):
    source, tokenizer = BUNDLE / "v2/train_run/sft/latest.pt", BUNDLE / "v2/tokenizer/spm.model"
    arguments = ["--ckpt", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert main(["export", "hf", *arguments]) == 0
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"


@needs_bundle
def test_published_byte_models(tmp_path):
    source = BUNDLE / "v1/best_with_opt.pt"
    assert main(["export", "hf", "--ckpt", str(source), "--out", str(tmp_path / "out")]) == 0
