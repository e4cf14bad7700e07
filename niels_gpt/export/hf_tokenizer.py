"""Our tokenizers as a `tokenizer.json`, whose ids equal ours on any text.

The lossless kind needs no normalisation there: pieces keep real blanks where SentencePiece writes U+2581, so a real
U+2581 is just a character that no piece holds, and goes by its bytes. A merge is a pair of pieces that joins to one;
SentencePiece applies the best scored first, and of equals the leftmost, which is what `_merges` orders for.
"""

from __future__ import annotations

from typing import Any

from niels_gpt.export.needs import needed
from niels_gpt.export.spm import SENTINEL_ID, SpmModel, untypable
from niels_gpt.export.templates import MARK
from niels_gpt.unicode import BLANK

_UNLIKELY = -1e6  # score of pieces that no text may become: bytes and specials of a unigram model
# What nmt_nfkc takes for a blank.
_BLANKS = "[\t\n\f\r\u00a0\u061c\u1680\u2000-\u200c\u200e\u200f\u2028\u2029\u202f\u205f\u2581\u3000\ufeff\ufffd]"
_LIKE_A_SPECIAL = rf"\|ngpt_[a-z_]+_{SENTINEL_ID}\|>"


def bpe_json(spm: SpmModel) -> str:
    """`tokenizer.json` of a lossless model."""
    t = needed("tokenizers")
    names = [untypable(p) if p.kind in ("control", "unknown") else p.text.replace(BLANK, " ") for p in spm.pieces]
    vocabulary = {name: i for i, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ValueError("this tokenizer has two pieces of the same spelling, which tokenizer.json cannot represent")
    scores = {names[i]: p.score for i, p in enumerate(spm.pieces) if p.kind == "normal"}
    model = t.models.BPE(vocab=vocabulary, merges=_merges(scores), byte_fallback=True, fuse_unk=False)
    tokenizer = t.Tokenizer(model)
    tokenizer.normalizer = t.normalizers.Replace(MARK + SENTINEL_ID, SENTINEL_ID)
    tokenizer.decoder = t.decoders.Sequence([t.decoders.ByteFallback(), t.decoders.Fuse()])
    _add_specials(tokenizer, [names[i] for i, p in enumerate(spm.pieces) if p.kind in ("control", "unknown")])
    return str(tokenizer.to_str())


def unigram_json(spm: SpmModel) -> str:
    """`tokenizer.json` of a unigram model that normalises text, as the published ones do."""
    t = needed("tokenizers")
    if spm.model != "unigram" or spm.add_dummy_prefix or spm.blank_as_suffix:
        raise ValueError(f"a SentencePiece model of the kind {spm.description} has no exact tokenizer.json")
    special = [i for i, p in enumerate(spm.pieces) if p.kind in ("control", "unknown", "user")]
    vocabulary = [
        (untypable(p) if i in special else p.text, p.score if p.kind == "normal" else _UNLIKELY)
        for i, p in enumerate(spm.pieces)
    ]
    unknown = next(i for i, p in enumerate(spm.pieces) if p.kind == "unknown")
    tokenizer = t.Tokenizer(t.models.Unigram(vocabulary, unk_id=unknown, byte_fallback=spm.byte_fallback))
    steps: list[Any] = [t.normalizers.Replace(MARK + SENTINEL_ID, SENTINEL_ID)]
    if spm.charsmap:
        # That normaliser goes by grapheme and drops what combines with a character it changes: blanks first.
        steps.append(t.normalizers.Replace(t.Regex(_BLANKS), " "))
        steps.append(t.normalizers.Precompiled(spm.charsmap))
    if spm.remove_extra_whitespaces:
        steps += [t.normalizers.Strip(), t.normalizers.Replace(t.Regex(" {2,}"), " ")]
    steps.append(t.normalizers.Replace(" ", BLANK))
    tokenizer.normalizer = t.normalizers.Sequence(steps)
    # Unigram models here know no kinds of pieces: text like <0x0A>, or a sentinel, is cut as our encoder cuts it.
    looks_special = rf"<(?={_LIKE_A_SPECIAL})|(?<=<){_LIKE_A_SPECIAL}"
    tokenizer.pre_tokenizer = t.pre_tokenizers.Sequence(
        [
            t.pre_tokenizers.Split(t.Regex(looks_special), "isolated"),
            t.pre_tokenizers.Split(t.Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"),
        ]
    )
    steps = [t.decoders.Replace(BLANK, " "), t.decoders.ByteFallback(), t.decoders.Fuse()]
    if spm.remove_extra_whitespaces:
        steps.append(t.decoders.Strip(" ", 1, 0))
    tokenizer.decoder = t.decoders.Sequence(steps)
    _add_specials(tokenizer, [vocabulary[i][0] for i in special])
    return str(tokenizer.to_str())


def byte_json() -> str:
    """`tokenizer.json` whose ids are UTF-8 bytes."""
    t = needed("tokenizers")
    spelled = sorted(byte_spelling().items())
    tokenizer = t.Tokenizer(t.models.BPE(vocab={name: byte for byte, name in spelled}, merges=[]))
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    return str(tokenizer.to_str())


def byte_spelling() -> dict[int, str]:
    """The printable character by which byte-level vocabularies since GPT-2 write each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in the order in which SentencePiece would apply them."""
    best_first = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    found = []
    for piece in best_first:
        cuts = [k for k in range(1, len(piece)) if piece[:k] in scores and piece[k:] in scores]
        # Two pairs of one piece compete only where they overlap (ab|a|ba): the left one has its end as its beginning.
        cuts.sort(key=lambda k: (not piece.startswith(piece[k:]), -k))
        found += [(piece[:k], piece[k:]) for k in cuts]
    return found


def _add_specials(tokenizer: Any, names: list[str]) -> None:
    t = needed("tokenizers")
    tokenizer.add_special_tokens([t.AddedToken(name, special=True, normalized=False) for name in names])
