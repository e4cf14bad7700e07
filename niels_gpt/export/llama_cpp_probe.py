"""Asks llama.cpp itself what a GGUF file does: JSON in, JSON out.

A program of its own, which needs only `llama_cpp` and numpy, so that any Python that has them can answer, and a crash
in native code ends no export. The question: {"model": path, "context": T, "texts": [...], "chats": [rendered, ...],
"rows": [ids, ...], "logits": path of a .npy to write, "greedy": [ids, ...], "new_tokens": N}. The answer:
{"texts": [ids, ...], "chats": [ids, ...], "greedy": [new ids, ...]}; logits are (rows, T, V) float32.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Tokens, logits and greedy continuations of one file, in float32 with a float32 cache."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        question["model"],
        n_ctx=question["context"],
        n_batch=question["context"],
        n_threads=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    rows = []
    for row in question.get("rows", ()):
        llama.reset()
        llama.eval(row)
        rows.append(llama.scores[: len(row)].copy())
    if rows:
        np.save(question["logits"], np.stack(rows).astype(np.float32))
    greedy = []
    for prompt in question.get("greedy", ()):
        llama.reset()
        new: list[int] = []
        feed = prompt
        for _ in range(question["new_tokens"]):
            llama.eval(feed)
            feed = [int(np.argmax(llama.scores[llama.n_tokens - 1]))]
            new += feed
        greedy.append(new)
    return {
        "texts": [llama.tokenize(t.encode(), add_bos=True, special=False) for t in question.get("texts", ())],
        "chats": [llama.tokenize(t.encode(), add_bos=True, special=True) for t in question.get("chats", ())],
        "greedy": greedy,
    }


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
