"""llama.cpp itself runs the files as we do. Where llama-cpp-python is not installed, these skip.

`LLAMA_CPP_PYTHON=/path/to/python pytest tests/export/test_native.py` asks another Python that has it.
"""

from __future__ import annotations

import pytest

from niels_gpt.checkpoint import load_model
from niels_gpt.export import native
from niels_gpt.export.gguf_file import write_gguf
from niels_gpt.infer.kv_cache import generate_ids_greedy_cached
from tests.export.models import ARCHITECTURES, PROMPTS, save

PYTHON = native.python_with_llama_cpp()
pytestmark = pytest.mark.skipif(PYTHON is None, reason="llama-cpp-python is not here; LLAMA_CPP_PYTHON can name it")
NEW_TOKENS = 64


@pytest.mark.parametrize("kind", ["new", "v2", "plain", "v1"])
def test_llama_cpp_reads_and_computes_the_same(tmp_path, tiny_tokenizer, kind):
    tokenizer_model = None if kind == "v1" else tiny_tokenizer.model_bytes
    loaded = load_model(save(tmp_path / "a.pt", ARCHITECTURES[kind], tokenizer_model), device="cpu")
    write_gguf(loaded, tmp_path / "a.gguf", "f32")
    worst = native.compare(PYTHON, tmp_path / "a.gguf", loaded)
    assert worst < (0.05 if kind == "v1" else native.TOLERANCE)  # llama.cpp approximates v1's GELU
    if kind != "v1":
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [loaded.chat_format.encode_prompt(c, context=192, max_new_tokens=NEW_TOKENS).ids for c in chats]
        question = {"model": str(tmp_path / "a.gguf"), "context": 192, "greedy": prompts, "new_tokens": NEW_TOKENS}
        for prompt, new in zip(prompts, native.ask(PYTHON, question)["greedy"], strict=True):
            ours = generate_ids_greedy_cached(loaded.model, prompt, max_new_tokens=NEW_TOKENS, eot_token_id=None)
            assert new == ours[len(prompt) :]
