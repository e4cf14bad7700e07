"""The one way this project runs the SentencePiece trainer: options, and its errors in words for people.

Text in, model bytes out; `tokenizer/training.py` adds the checks and the files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import sentencepiece

from niels_gpt.settings import PIECE_IDS
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS
from niels_gpt.unicode import BLANK

CHUNK_CHARS = 100_000  # SentencePiece drops "sentences" above its limit without a word


def train_model(texts: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """The bytes of a lossless model, the same for the same texts (method: Kudo & Richardson 2018, SentencePiece).

    Raises:
        ValueError: the text cannot fill `vocab_size`, or needs a larger one; the message says which would do.
    """
    chunks = [t[i : i + CHUNK_CHARS] for t in texts for i in range(0, len(t), CHUNK_CHARS)]
    if not any(" " in chunk for chunk in chunks):  # SentencePiece 0.2.2 aborts where a required character has no count
        chunks += [f"{chunk[0]} {chunk[0]}" for chunk in chunks[:1]]
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=writer,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=0.9999,  # rarer characters go by bytes and leave their place to words
            byte_fallback=True,
            required_chars=BLANK,  # without this piece a blank would decode as U+2581
            control_symbols=[SPECIAL_TOKENS[name] for name in SPECIAL_TOKEN_IDS],
            unk_id=PIECE_IDS["unk_id"],
            bos_id=PIECE_IDS["bos_id"],
            eos_id=PIECE_IDS["eos_id"],
            pad_id=PIECE_IDS["pad_id"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,  # a number is its digits, whatever the vocabulary
            max_sentencepiece_length=16,
            max_sentence_length=8 * CHUNK_CHARS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_in_words(str(error), vocab_size)) from None
    return writer.getvalue()


def _in_words(message: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too big: this text gives at most {largest[1]} pieces; "
            f"ask for {largest[1]} or less, or give more text"
        )
    if smallest := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: specials, 256 bytes and the characters of this text "
            f"need {smallest[1]}; ask for more"
        )
    return f"SentencePiece cannot train on this text: {message}"


def vocab_table(model: bytes) -> str:
    """One `piece<tab>score` line per id, for people; a piece with a line break or a tab is escaped."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = (sp.id_to_piece(i) for i in range(sp.get_piece_size()))
    shown = (piece if piece.isprintable() else ascii(piece)[1:-1] for piece in pieces)
    return "".join(f"{piece}\t{sp.get_score(i):g}\n" for i, piece in enumerate(shown))
