"""llama.cpp itself runs the files as we do. Where llama-cpp-python is not installed, what needs it skips.

`LLAMA_CPP_PYTHON=/path/to/python pytest tests/export/test_llama_cpp.py` asks another Python that has it.
"""

from __future__ import annotations

import pytest

from niels_gpt.checkpoint import load_model
from niels_gpt.export import llama_cpp
from niels_gpt.export.gguf_file import write_gguf
from niels_gpt.infer.kv_cache import generate_ids_greedy_cached
from tests.export.models import ARCHITECTURES, PROMPTS, save

PYTHON = llama_cpp.python_with_llama_cpp()
needs_llama_cpp = pytest.mark.skipif(
    PYTHON is None, reason="llama-cpp-python is not here; LLAMA_CPP_PYTHON can name it"
)
NEW_TOKENS = 64


def test_a_llama_cpp_that_hangs_is_one_line(tmp_path, monkeypatch):
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(llama_cpp, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="did not answer about the file within"):
        llama_cpp.ask(str(sleeper), {})


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["new", "v2", "plain", "v1"])
def test_llama_cpp_reads_and_computes_the_same(tmp_path, tiny_tokenizer, kind):
    tokenizer_model = None if kind == "v1" else tiny_tokenizer.model_bytes
    loaded = load_model(save(tmp_path / "a.pt", ARCHITECTURES[kind], tokenizer_model), device="cpu")
    write_gguf(loaded, tmp_path / "a.gguf", "f32")
    worst = llama_cpp.compare(PYTHON, tmp_path / "a.gguf", loaded)
    assert worst < (0.05 if kind == "v1" else llama_cpp.TOLERANCE)  # llama.cpp approximates v1's GELU
    if kind != "v1":
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [loaded.chat_format.encode_prompt(c, context=192, max_new_tokens=NEW_TOKENS).ids for c in chats]
        question = {"model": str(tmp_path / "a.gguf"), "context": 192, "greedy": prompts, "new_tokens": NEW_TOKENS}
        for prompt, new in zip(prompts, llama_cpp.ask(PYTHON, question)["greedy"], strict=True):
            ours = generate_ids_greedy_cached(loaded.model, prompt, max_new_tokens=NEW_TOKENS, eot_token_id=None)
            assert new == ours[len(prompt) :]
