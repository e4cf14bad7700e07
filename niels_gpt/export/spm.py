"""What is inside a SentencePiece model file: its pieces and how it normalises text, as plain records."""

from __future__ import annotations

from dataclasses import dataclass

from niels_gpt.export.needs import needed
from niels_gpt.special_tokens import EOT_TOKEN, SPECIAL_TOKENS

_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
_MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SENTINEL_ID = EOT_TOKEN.rpartition("_")[2].removesuffix("|>")  # what all four sentinels have in common


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece vocabulary."""

    text: str
    kind: str  # normal | unknown | control | user | unused | byte
    score: float


@dataclass(frozen=True)
class SpmModel:
    """A SentencePiece model: `pieces[i]` is id i."""

    pieces: tuple[Piece, ...]
    model: str  # unigram | bpe | word | char
    byte_fallback: bool
    normalization: str  # identity | nmt_nfkc | ...
    charsmap: bytes  # the normalisation, compiled; empty for identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    blank_as_suffix: bool

    @property
    def is_lossless(self) -> bool:
        """True for the kind that this project trains: BPE on the text as it is, with bytes for what is missing."""
        plain = self.normalization == "identity" and not self.charsmap
        kept = not (self.add_dummy_prefix or self.remove_extra_whitespaces or self.blank_as_suffix)
        kinds = {p.kind for p in self.pieces}
        return self.model == "bpe" and self.byte_fallback and plain and kept and "user" not in kinds

    @property
    def description(self) -> str:
        """Words for an error message, such as `unigram with nmt_nfkc normalisation`."""
        return f"{self.model} with {self.normalization} normalisation"


def read_spm(model_bytes: bytes) -> SpmModel:
    """Parse a SentencePiece model file; ValueError if it is none."""
    proto = needed("sentencepiece.sentencepiece_model_pb2").ModelProto()
    try:
        proto.ParseFromString(model_bytes)
    except Exception as error:  # protobuf's own DecodeError
        raise ValueError(f"this is not a SentencePiece model: {error}") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return SpmModel(
        pieces=tuple(Piece(p.piece, _KINDS[p.type], p.score) for p in proto.pieces),
        model=_MODELS[trainer.model_type],
        byte_fallback=trainer.byte_fallback,
        normalization=normalizer.name,
        charsmap=normalizer.precompiled_charsmap,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        blank_as_suffix=trainer.treat_whitespace_as_suffix,
    )


def untypable(piece: Piece) -> str:
    """The name of a special piece elsewhere: `<s>`, `</s>` and `<unk>` occur in ordinary text (HTML), so they get names
    like the sentinels', which keep theirs."""
    if piece.text in SPECIAL_TOKENS.values():
        return piece.text
    name = "".join(c for c in piece.text if c.isalnum())
    end = "end_" if piece.text.startswith("</") else ""
    return EOT_TOKEN.replace("eot", f"{end}{name}", 1)
