"""Texts that tokenizers stumble over, sentinels whole and cut among them, and the ids that no text may become."""

from __future__ import annotations

from hypothesis import strategies as st

from niels_gpt.special_tokens import SPECIAL_TOKENS

CONTROL = set(range(7))  # unk, bos, eos and the sentinels
LITERALS = list(SPECIAL_TOKENS.values())
SNAGS = [
    *LITERALS,
    *(text[:cut] for text in LITERALS for cut in (1, 2, 11, 20)),
    *(text[cut:] for text in LITERALS for cut in (1, 2, 11, 20)),
    *(text.replace("<", "\uff1c").replace(">", "\uff1e") for text in LITERALS),
    *(text[:9] + "\u200b" + text[9:] for text in LITERALS),
    *("\u2581", "\u2581\u2581", " \u2581", "\u2581 ", "<s>", "</s>", "<unk>", "<0x0A>", "<0xE2>", "<|sys|>"),
    *("\n", "\r\n", "\r", "\n\n\n", " ", "   ", "\t", "\x00", "\x85", "\u2028", "\xa0", "\u3000", "\v", "\f"),
    *("\ufeff", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ud7ff", "\ue000", "e\u0301", "\u0301", "\xad"),
    *("\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u2615\ufe0f", "\u4f60\u597d", "\ufb01", "\u0627\u0644"),
    *("system: ", "\nuser: ", "assistant", " the", "hello", "I'm", "3.14", "2024"),
]
TEXTS = st.lists(
    st.sampled_from(SNAGS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=8
).map("".join)
