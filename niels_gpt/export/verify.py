"""The comparisons that stand between an export and its name; each raises ValueError with one line on a mismatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.data.types import ROLES, Message
from niels_gpt.export import names, samples
from niels_gpt.export.hf import DTYPES, rounded, tokenizer_parts
from niels_gpt.export.needs import needed
from niels_gpt.model.gpt import GPT
from niels_gpt.tokenizer import Tokenizer

TOLERANCE = 1e-4  # of logits in float32
WITHOUT_END = 1 << 40  # positions: a context that no conversation fills, so nothing is left out
Encode = Callable[[str], Sequence[int]]
EncodeChat = Callable[[list[dict[str, str]]], Sequence[int]]  # messages -> ids that ask for the next reply


def verify_hf(folder: Path, loaded: LoadedModel, dtype: str) -> float:
    """Load `folder` with plain transformers and compare everything; returns the largest difference of a logit."""
    tokenizer = load_with_transformers("AutoTokenizer", folder)

    def encode_chat(messages: list[dict[str, str]]) -> list[int]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(ids)

    texts = samples.strings(loaded.tokenizer)
    same_ids(loaded.tokenizer, texts, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    same_text(loaded.tokenizer, texts, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    forged = [[Message(role, text)] for text in samples.forgeries() for role in ROLES]
    same_chats(loaded, samples.conversations(texts) + forged, encode_chat)
    model = load_with_transformers("AutoModelForCausalLM", folder, dtype=torch.float32).eval()
    worst = same_logits(as_stored(loaded, dtype), lambda ids: model(ids).logits)
    _same_files(folder, loaded, dtype)
    return worst


def load_with_transformers(auto_class: str, folder: Path, **options: Any) -> Any:
    """A model or tokenizer of plain transformers; ValueError if it cannot load the folder."""
    loader = getattr(needed("transformers"), auto_class)
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # its libraries raise almost anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"transformers cannot load {folder.name}: {reason}") from None


def _same_files(folder: Path, loaded: LoadedModel, dtype: str) -> None:
    """What samples may not touch: every weight, and every piece and merge, as they were meant to be written."""
    expected = rounded(names.to_hf(loaded.model.state_dict(), loaded.model.cfg, loaded.model.arch), DTYPES[dtype])
    same_weights(needed("safetensors.torch").load_file(folder / "model.safetensors"), expected)
    content = tokenizer_parts(loaded.tokenizer, loaded.model.cfg.T)[0]
    if (folder / "tokenizer.json").read_text(encoding="utf-8") != content:
        raise ValueError("the export's tokenizer.json is not what was written")


def as_stored(loaded: LoadedModel, dtype: str) -> GPT:
    """Our model with the weights that the export holds, in float32."""
    if dtype == "f32":
        return loaded.model
    model, state = loaded.model, loaded.model.state_dict()
    other = GPT(model.cfg, model.arch).eval()
    other.load_state_dict({name: tensor.float() for name, tensor in rounded(state, DTYPES[dtype]).items()})
    return other


@torch.no_grad()
def same_logits(
    ours: GPT,
    theirs: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
    *,
    named: str = "the export's logits",
) -> float:
    """Compare logits on rows of random ids, which fill the context; returns the largest difference.

    named: what an error calls the logits of `theirs`.
    """
    ids = samples.rows(ours.cfg)
    worst = 0.0
    for row in ids.split(1):
        expected, found = ours(row), theirs(row).float()
        if found.shape != expected.shape:
            raise ValueError(f"{named} have shape {tuple(found.shape)}, ours {tuple(expected.shape)}")
        difference = float((found - expected).abs().max())
        if not difference <= tolerance:  # NaN included
            raise ValueError(f"{named} differ by {difference:.2g}, more than {tolerance:g}")
        worst = max(worst, difference)
    return worst


def same_ids(tokenizer: Tokenizer, texts: Sequence[str], encode: Encode) -> None:
    """Compare token ids of texts."""
    for text in texts:
        expected, found = tokenizer.encode(text), list(encode(text))
        if found != expected:
            raise ValueError(f"the export's tokenizer reads {_short(text)} as {_first_difference(found, expected)}")


def same_text(tokenizer: Tokenizer, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
    """Compare the texts of those texts' ids."""
    for text in texts:
        ids = tokenizer.encode(text)
        if decode(ids) != tokenizer.decode(ids):
            raise ValueError(f"the export's tokenizer writes the ids of {_short(text)} as {_short(decode(ids))}")


def same_chats(loaded: LoadedModel, chats: Sequence[list[Message]], encode_chat: EncodeChat) -> None:
    """Compare ids of whole conversations, whoever spoke last, with another reply asked for."""
    for messages in chats:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        expected = loaded.chat_format.encode_prompt(messages, context=WITHOUT_END, max_new_tokens=1).ids
        found = list(encode_chat(plain))
        if found != expected:
            raise ValueError(
                f"the export's chat template reads {_short(str(plain))} as {_first_difference(found, expected)}"
            )


def same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare state dicts to the bit."""
    if different := set(found) ^ set(expected):
        raise ValueError(f"the export lacks or adds the weights {', '.join(sorted(different)[:5])}")
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise ValueError(f"the export's weights {name} are not the model's")


def _first_difference(found: Sequence[int], expected: Sequence[int]) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    return f"{list(found[at : at + 8])} from its token {at} on, where it should be {list(expected[at : at + 8])}"


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")
