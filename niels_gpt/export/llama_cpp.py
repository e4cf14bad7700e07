"""Asking llama.cpp itself about a GGUF file, where llama-cpp-python is installed.

It is asked in a process of its own (`llama_cpp_probe`), with this Python or the one that `LLAMA_CPP_PYTHON` names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.export import names, samples
from niels_gpt.export.gguf_file import template_for
from niels_gpt.export.verify import same_chats, same_ids
from niels_gpt.export.verify_gguf import gguf_texts, renderer

PROBE = Path(__file__).with_name("llama_cpp_probe.py")
TOLERANCE = 1e-4  # of logits, as for transformers
SECONDS = 600


def python_with_llama_cpp() -> str | None:
    """The Python that has llama-cpp-python; None if there is none."""
    if named := os.environ.get("LLAMA_CPP_PYTHON"):
        return named
    return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None


def ask(python: str, question: dict[str, Any]) -> dict[str, Any]:
    """Put a question to `llama_cpp_probe`, whose docstring tells its form; ValueError if llama.cpp fails."""
    with tempfile.TemporaryDirectory() as elsewhere:  # and as text: nothing here may pass for a module of that Python
        try:
            done = subprocess.run(
                [python, "-c", PROBE.read_text(encoding="utf-8")],
                input=json.dumps(question),
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
                cwd=elsewhere,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"llama.cpp did not answer about the file within {SECONDS:g} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        raise ValueError(f"llama.cpp cannot use the file: {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(python: str, path: Path, loaded: LoadedModel, rows: int = samples.ROWS) -> float:
    """Compare token ids, chats and the logits of `rows` rows; returns the largest difference of a logit.

    ValueError with one line at the first mismatch. Logits may differ where llama.cpp approximates the architecture.
    """
    texts, render = gguf_texts(loaded), renderer(template_for(loaded))
    chats = samples.conversations(texts)
    rendered = [render([{"role": m.role, "content": m.content} for m in chat]) for chat in chats]
    ids = samples.rows(loaded.model.cfg)[:rows]
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits.npy"
        question = {
            "model": str(path.resolve()),
            "context": loaded.model.cfg.T,
            "texts": texts,
            "chats": rendered,
            "rows": ids.tolist(),
            "logits": str(logits),
        }
        answer = ask(python, question)
        found = torch.from_numpy(np.load(logits)) if rows else None
    read = dict(zip(texts, answer["texts"], strict=True))
    same_ids(loaded.tokenizer, texts, read.__getitem__)
    answers = iter(answer["chats"])
    same_chats(loaded, chats, lambda messages: next(answers))
    if found is None:
        return 0.0
    with torch.no_grad():
        difference = float((loaded.model(ids) - found).abs().max())
    approximate = names.architecture_for(loaded.model.arch) == names.NEOX
    if not difference <= TOLERANCE and not approximate:
        raise ValueError(f"llama.cpp's logits differ by {difference:.2g}, more than {TOLERANCE:g}")
    return difference
