"""What there is to read: the text and chats behind a plan, in bytes and tokens, and what their caches take on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from niels_gpt import spm_training
from niels_gpt.data.registry import canonical_name, forget_text, get_source
from niels_gpt.data.types import SPLITS
from niels_gpt.device import memory_in_use, peak_memory, return_freed_memory, usable_cores
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.tokenizer.corpus import MIX_BYTES, mix_corpora

PRIMER = "primer"  # in every mix, with the recipe's share: it is what the chats are about
TOKEN_BYTES, LABEL_BYTES, DOCUMENT_BYTES = 2, 4, 24  # in caches: ids, labels of chats, index of documents and chats
CHAT_DOCUMENT_BYTES = 8
META_BYTES = 2000
TURN_TOKENS = 2  # sentinels around a message of a chat
SAMPLE_BYTES = 1_000_000  # of text that is tokenized to see how fast that goes
WORKERS_START_S = 2.0  # starting the processes that tokenize
TOKENIZER_BYTES = 12_000_000  # of text that a tokenizer is trained on in a probe; more is scaled up
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """One source as counted: UTF-8 bytes and documents of training and validation; of chats also messages."""

    name: str
    train_bytes: int
    val_bytes: int
    documents: int
    messages: int = 0


@dataclass(frozen=True)
class Text:
    """All that is learnt from, and what making it ready takes on this machine."""

    pretrain: tuple[Source, ...]
    chats: tuple[Source, ...]
    bytes_per_token: float
    tokenizer_s: float
    caches_s: float
    preparing_bytes: float  # memory of a process at the highest while it makes tokenizer and caches

    @property
    def unique_tokens(self) -> float:
        """Tokens of text to train on."""
        return sum(s.train_bytes + s.documents for s in self.pretrain) / self.bytes_per_token

    def val_tokens(self, source: str) -> float:
        return next(s.val_bytes for s in self.pretrain if s.name == source) / self.bytes_per_token

    @property
    def cache_bytes(self) -> float:
        """Of both phases' caches on disk."""
        text = sum(self._tokens(s) * TOKEN_BYTES + s.documents * DOCUMENT_BYTES + META_BYTES for s in self.pretrain)
        chats = sum(
            (self._tokens(s) + s.messages * TURN_TOKENS) * (TOKEN_BYTES + LABEL_BYTES)
            + s.documents * CHAT_DOCUMENT_BYTES
            for s in self.chats
        )
        return text + chats

    def _tokens(self, source: Source) -> float:
        return (source.train_bytes + source.val_bytes) / self.bytes_per_token


def mix_of(names: Sequence[str], primer_share: float, tokens: dict[str, float]) -> dict[str, float]:
    """The pretraining mix of sources: each by its tokens, the primer always in it with the recipe's share."""
    others = [name for name in names if name != PRIMER]
    total = sum(tokens[name] for name in others)
    if not others or not total:
        return {PRIMER: 1.0}
    shares = {name: (1 - primer_share) * tokens[name] / total for name in others}
    return {PRIMER: primer_share, **shares}


def checked_sources(names: Sequence[str]) -> list[str]:
    """Canonical names of sources that have documents to read; ValueError names what is wrong."""
    found = list(dict.fromkeys(canonical_name(name.strip()) for name in names))
    for name in found:
        if get_source(name).documents is None:
            raise ValueError(
                f"{name} is no source of text that can be read to the end, so a plan cannot count it; leave it out"
            )
    return found if PRIMER in found else [*found, PRIMER]


def read_text(settings: Settings, say: Say) -> Text:
    """Count the sources of both mixes, train a tokenizer on a part and tokenize a sample, all of it timed.

    Raises: what the sources raise when their text is not there.
    """
    before, began = memory_in_use("cpu"), time.perf_counter()
    text = [_count_text(settings, name, say) for name in sorted(settings.data.mix_pretrain)]
    text_s = time.perf_counter() - began
    if not any(source.train_bytes for source in text):
        raise ValueError("there is no text to train on in " + ", ".join(source.name for source in text))
    began = time.perf_counter()
    chats = [_count_chats(settings, name, say) for name in sorted(settings.data.mix_sft)]
    chats_s = time.perf_counter() - began
    seen = sum(source.train_bytes for source in text)
    tried = _try_tokenizing(settings, say)
    more = max(1.0, min(seen, MIX_BYTES) / tried.read_bytes)  # what a run's tokenizer reads beyond that
    total = sum(s.train_bytes + s.val_bytes for s in (*text, *chats))
    caches_s = text_s + chats_s + total * tried.seconds_per_byte / _encoding_cores() + WORKERS_START_S
    highest = before + (peak_memory("cpu") - before) * more
    forget_text()
    return_freed_memory()
    tokenizer_s = text_s / 2 + tried.training_s * more
    return Text(tuple(text), tuple(chats), tried.bytes_per_token, tokenizer_s, caches_s, highest)


@dataclass(frozen=True)
class Tried:
    """A tokenizer trained on some of the text, and what it took."""

    read_bytes: int
    training_s: float
    seconds_per_byte: float  # of tokenizing
    bytes_per_token: float


def _try_tokenizing(settings: Settings, say: Say) -> Tried:
    """Train a tokenizer on at most `TOKENIZER_BYTES` and tokenize a sample with it."""
    say("training a tokenizer")
    corpora = mix_corpora(settings, TOKENIZER_BYTES)
    sample = [text for corpus in corpora for text in corpus.unchecked()]
    read = sum(corpus.read["bytes"] for corpus in corpora)
    began = time.perf_counter()
    tokenizer = _tokenizer(sample, settings.tokenizer.vocab_size)
    training_s = time.perf_counter() - began
    say("tokenizing a sample")
    every = max(1, len(sample) * SAMPLE_BYTES // max(1, read))
    spread = sample[:: max(1, len(sample) // every)]
    size = sum(len(one.encode()) for one in spread)
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode(one)) + 1 for one in spread)
    return Tried(read, training_s, (time.perf_counter() - began) / size, size / tokens)


def _encoding_cores() -> float:
    return max(1.0, 0.8 * usable_cores())


def _count_text(settings: Settings, name: str, say: Say) -> Source:
    say(f"counting the text of {name}")
    documents = get_source(name).documents
    assert documents is not None
    sizes = {
        split: [len(d.text.encode("utf-8", "surrogatepass")) for d in documents(settings, split)] for split in SPLITS
    }
    return Source(name, sum(sizes["train"]), sum(sizes["val"]), len(sizes["train"]) + len(sizes["val"]))


def _count_chats(settings: Settings, name: str, say: Say) -> Source:
    say(f"counting the chats of {name}")
    source = get_source(name)
    if source.chats is None:
        raise ValueError(f"{name} has no chats; data.mix_sft must name sources that have")
    sizes, chats, messages = dict.fromkeys(SPLITS, 0), 0, 0
    for split in SPLITS if source.splits_chats else ("all",):
        for chat in source.chats(settings, split):
            sizes["train" if split == "all" else split] += sum(len(m.content.encode()) for m in chat.messages)
            chats, messages = chats + 1, messages + len(chat.messages)
    return Source(name, sizes["train"], sizes["val"], chats, messages)


def _tokenizer(texts: Sequence[str], vocab_size: int) -> SentencePieceTokenizer:
    model = spm_training.train_model(texts, vocab_size, "bpe")
    return SentencePieceTokenizer.from_bytes(model, expected_special_token_ids=SPECIAL_TOKEN_IDS)
