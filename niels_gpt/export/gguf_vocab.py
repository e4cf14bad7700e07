"""Vocabularies as GGUF holds them, and how llama.cpp reads text with them (checked against its source and itself).

llama.cpp knows two kinds that fit: `llama`, which is SentencePiece BPE (neighbours that join to a piece are merged,
best score first, leftmost of equals; what is no piece goes by bytes), and `gpt2`, byte-level BPE, which without merges
is a byte vocabulary. It has no SentencePiece normalisation, and its unigram models know no byte fallback. The one thing
that the `llama` kind cannot be told: a U+2581 in a text is a blank to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from niels_gpt.export.hf_tokenizer import byte_spelling
from niels_gpt.export.spm import SpmModel, read_spm, untypable
from niels_gpt.special_tokens import EOT_TOKEN
from niels_gpt.tokenizer import SentencePieceTokenizer, Tokenizer
from niels_gpt.unicode import BLANK

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # token types of GGUF
_TYPES = {"normal": NORMAL, "unknown": UNKNOWN, "control": CONTROL, "unused": UNUSED, "byte": BYTE}
_NEVER = "\u00fe \u00ff"  # merges the bytes FE and FF, which no UTF-8 text has; llama.cpp wants a list of merges
_LAST = 0xFF  # a byte that no UTF-8 text has: byte models end nowhere, llama.cpp wants an end


@dataclass(frozen=True)
class GgufVocab:
    """The fields of `tokenizer.ggml.*`; `tokens[i]` is id i."""

    model: str  # llama | gpt2
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]  # of the kind llama
    merges: tuple[str, ...]  # of the kind gpt2
    eos: int
    bos: int


def vocab_of(tokenizer: Tokenizer, V: int) -> GgufVocab:
    """A tokenizer's vocabulary, filled up to the model's V ids; ValueError with the reason if GGUF cannot hold it."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        spelled = byte_spelling()
        return GgufVocab(
            "gpt2", tuple(spelled[byte] for byte in range(256)), (NORMAL,) * 256, (), (_NEVER,), eos=_LAST, bos=_LAST
        )
    spm = read_spm(tokenizer.model_bytes)
    _check(spm)
    tokens = [untypable(p) if p.kind in ("control", "unknown") else p.text for p in spm.pieces]
    types = [_TYPES[p.kind] for p in spm.pieces]
    scores = [p.score for p in spm.pieces]
    for n in range(len(tokens), V):
        tokens.append(EOT_TOKEN.replace("eot", f"unused{n}", 1))
        types.append(UNUSED)
        scores.append(-1e9)
    if len(set(tokens)) != len(tokens):
        raise ValueError("this tokenizer has two pieces of the same spelling, which GGUF cannot represent")
    eos = tokenizer.special_token_ids()["eot"]
    return GgufVocab("llama", tuple(tokens), tuple(types), tuple(scores), (), eos=eos, bos=1)


def _check(spm: SpmModel) -> None:
    if spm.model != "bpe":
        raise ValueError(
            f"GGUF cannot represent this tokenizer: it is {spm.model}, and llama.cpp's unigram knows no byte fallback;"
            " its kind `llama` merges as BPE does. Export to hf instead, or train with a BPE tokenizer"
        )
    if not spm.is_lossless:
        raise ValueError(
            f"GGUF cannot represent this tokenizer: it is {spm.description}, and llama.cpp takes text for its kind"
            " `llama` as it is. Export to hf instead, or train with a tokenizer of `niels-gpt tokenizer`"
        )


class LlamaCppReader:
    """Text to ids as llama.cpp does it with a vocabulary, written from its source (src/llama-vocab.cpp)."""

    def __init__(self, vocab: GgufVocab) -> None:
        self._vocab = vocab
        self._ids = {token: i for i, token in enumerate(vocab.tokens)}
        special = [i for i, kind in enumerate(vocab.types) if kind in (CONTROL, UNKNOWN)]
        self._special = sorted(special, key=lambda i: -len(vocab.tokens[i].encode()))
        self._spelled = byte_spelling()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text; with `parse_special`, as for rendered chats, names of control tokens become their ids."""
        parts: list[str | int] = [text] if text else []
        for token_id in self._special if parse_special else ():
            parts = [piece for part in parts for piece in self._cut(part, token_id)]
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._plain(part)
        return ids

    def _cut(self, part: str | int, token_id: int) -> list[str | int]:
        if isinstance(part, int):
            return [part]
        found: list[str | int] = []
        for n, piece in enumerate(part.split(self._vocab.tokens[token_id])):
            found += [token_id] if n else []
            found += [piece] if piece else []
        return found

    def _plain(self, text: str) -> list[int]:
        if self._vocab.model == "gpt2":
            return [self._ids[self._spelled[byte]] for byte in text.encode()]
        return self._spm(text.replace(" ", BLANK))

    def _spm(self, text: str) -> list[int]:
        symbols: list[str] = list(text)
        after = [*range(1, len(symbols)), -1] if symbols else []
        before = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                if joined in self._ids:
                    heapq.heappush(queue, (-self._vocab.scores[self._ids[joined]], left, right, joined))

        for n in range(1, len(symbols)):
            consider(n - 1, n)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(joined):
                continue
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [i for symbol in symbols if symbol for i in self._ids_of(symbol)]

    def _ids_of(self, symbol: str) -> Sequence[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def as_llama_cpp_reads(text: str) -> str:
    """What a text is to the kind `llama`: a U+2581 in it is a blank."""
    return text.replace(BLANK, " ")
