"""Every knob of niels-gpt: its only default, its bounds, one line of help; and how overrides become a run's settings.

Overrides are a JSON diff of this tree. Objects merge into the defaults; `data.mix_pretrain` and `data.mix_sft` replace
them. Nothing here opens a tokenizer or a cache: a tokenizer file is only hashed. Everything wrong with a configuration
is one ValueError with one line per problem. `docs/settings.md` is generated from the help texts (`settings_doc`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from niels_gpt import files, paths
from niels_gpt.config import Architecture, ModelConfig, TrainConfig, to_dict
from niels_gpt.settings_errors import key_problems, one_error, reworded
from niels_gpt.settings_legacy import translate
from niels_gpt.special_tokens import SPECIAL_TOKEN_IDS, SPECIAL_TOKENS

PHASES = ("pretrain", "sft")
BYTE_VOCABULARY = 256
PIECE_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}  # of every SentencePiece model here; -1 = none
MIX_TOLERANCE = 1e-6
MANY = 2**31 - 1  # a bound that only stops nonsense
MAX_INT64 = 2**63 - 1

PretrainSource = Literal["wikitext", "fineweb_edu", "gutenberg", "roam", "chitchat", "primer", "text", "wiki_summaries"]
PRETRAIN_SOURCES: tuple[str, ...] = get_args(PretrainSource)
SFT_SOURCES = ("dolly15k", "oasst1", "primer", "chitchat")
StreamSources = Annotated[tuple[Literal["wiki", "roam", "primer"], ...], Strict(False)]
MatmulPrecision = Literal["highest", "high", "medium"]
Metric = Literal["pretrain_val_loss", "sft_val_loss", "weighted"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
FilePath = Annotated[Text, BeforeValidator(lambda v: os.fspath(v) if isinstance(v, Path) else v)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, le=65534)], ...], Strict(False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=MANY)], ...], Strict(False)]
Texts = Annotated[tuple[Text, ...], Strict(False)]
Mix = dict[str, float]
MetricWeights = dict[Literal["pretrain_val_loss", "sft_val_loss"], Annotated[float, Field(gt=0, le=1e6)]]


def _not_a_number(value: Any) -> Any:
    """Literal[True] would take 1; the error message shows the text instead."""
    return repr(value) if type(value) in (int, float) else value


Amp = Annotated[Literal[True, False, "auto"], BeforeValidator(_not_a_number)]


def knob(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its default, its line of help, and pydantic bounds (ge, gt, le, lt, pattern, ...)."""
    return Field(default=default, description=help, **bounds)


def section(kind: type[Section], help: str) -> Any:
    """A nested group of knobs."""
    return Field(default_factory=kind, description=help)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class SpecialTokenIds(Section):
    sys: int = knob(SPECIAL_TOKEN_IDS["sys"], "id that opens a system turn", ge=0, le=65534)
    usr: int = knob(SPECIAL_TOKEN_IDS["usr"], "id that opens a user turn", ge=0, le=65534)
    asst: int = knob(SPECIAL_TOKEN_IDS["asst"], "id that opens an assistant turn", ge=0, le=65534)
    eot: int = knob(SPECIAL_TOKEN_IDS["eot"], "id that ends every turn", ge=0, le=65534)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.model_dump().values())) < len(SPECIAL_TOKEN_IDS):
            raise ValueError(f"the four ids must differ, got {self.model_dump()}")
        return self


class TokenizerSettings(Section):
    type: Literal["bpe", "unigram", "byte"] = knob("bpe", "kind of tokenizer; byte needs no file and V = 256")
    model_path: FilePath = knob("artifacts/tokenizer/v2/spm.model", "SentencePiece model file")
    vocab_size: int = knob(16000, "pieces of a newly trained tokenizer", ge=BYTE_VOCABULARY, le=65535)
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


class StreamSettings(Section):
    enabled_sources: StreamSources = knob(("wiki", "roam", "primer"), "byte streams to build")
    required_sources: StreamSources = knob(("wiki", "roam", "primer"), "streams that must exist")
    allow_missing_sources: bool = knob(False, "go on without required sources that are missing")


class HubTextSettings(Section):
    """What every text source from the Hugging Face hub can be told."""

    max_examples: int | None = knob(None, "stop after this many documents; null = all", ge=1, le=MANY)
    max_bytes: int | None = knob(None, "stop after this many UTF-8 bytes; null = all", ge=1, le=MAX_INT64)


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


class GutenbergSettings(HubTextSettings):
    dataset_id: Text = knob("nikolina-p/gutenberg_clean_en_splits", "dataset on the hub")
    split: Text = knob("train", "split to read")
    shuffle: bool = knob(True, "shuffle documents in a buffer while streaming")


class RoamSettings(Section):
    root_dir: FilePath = knob("data/.roam-data", "folder of your own markdown notes")
    glob_pattern: Text = knob("**/*.md", "which files in it")
    val_frac: float = knob(0.1, "share of the files kept for validation", ge=0, lt=1)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)


class TextSettings(Section):
    root_dir: FilePath = knob("data/text", "folder of any text files of yours")
    glob_patterns: Texts = knob(("**/*.txt", "**/*.md"), "which files in it", min_length=1)
    val_frac: float = knob(0.1, "share of the files kept for validation", ge=0, lt=1)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)


class ChitchatSettings(Section):
    val_prompts: int = knob(4, "prompts whose dialogues are kept for validation", ge=0, le=MANY)
    split_seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)
    max_turns: int = knob(8, "longest chat, in turns; longer dialogues become several", ge=2, le=MANY)


class PrimerSettings(Section):
    path: FilePath = knob("data/primer.txt", "primer dialogues as text, for pretraining")
    jsonl_path: FilePath = knob("data/primer.jsonl", "primer dialogues as chats, for fine-tuning")
    delimiter: Text = knob("\n\n<dialogue>\n\n", "what separates dialogues in the text file")
    val_frac: float = knob(0.1, "share of the dialogues kept for validation", ge=0, lt=1)
    seed: int = knob(42, "seed of the split", ge=0, le=MAX_INT64)


class DollySettings(Section):
    dataset_id: Text = knob("databricks/databricks-dolly-15k", "dataset on the hub")
    split: Text = knob("train", "split to read")
    include_system: bool = knob(False, "open every chat with a default system message")
    max_examples: int | None = knob(None, "stop after this many chats; null = all", ge=1, le=MANY)


class Oasst1Settings(Section):
    dataset_id: Text = knob("OpenAssistant/oasst1", "dataset on the hub")
    split: Text = knob("train", "split to read")
    english_only: bool = knob(True, "drop messages in other languages, and what answers them")
    max_messages: int = knob(32, "longest thread, in messages", ge=2, le=MANY)
    shuffle_trees: bool = knob(True, "shuffle the threads")
    take_trees: int | None = knob(None, "stop after this many threads; null = all", ge=1, le=MANY)


MIX_PRETRAIN = {"fineweb_edu": 0.7, "wikitext": 0.2, "roam": 0.1}
MIX_SFT = {"primer": 0.1, "oasst1": 0.7, "dolly15k": 0.2}


class DataSettings(Section):
    caches: CacheSettings = section(CacheSettings, "where caches live")
    mix_pretrain: Mix = knob(MIX_PRETRAIN, f"share of each source ({', '.join(PRETRAIN_SOURCES)}); sums to 1")
    mix_sft: Mix = knob(MIX_SFT, f"share of each source ({', '.join(SFT_SOURCES)}); sums to 1")
    val_pretrain_source: PretrainSource = knob("wikitext", "source whose validation loss is pretrain_val_loss")
    replay_pretrain: float = knob(0.0, "share of fine-tuning rows drawn from mix_pretrain", ge=0, lt=1)
    val_sft_source: Literal["sft", "wikitext"] = knob("sft", "validate fine-tuning on its own chats, or on wikitext")
    allow_missing_idx: bool = knob(False, "treat a fine-tuning cache without its index as one long example")
    streams: StreamSettings = section(StreamSettings, "byte streams")
    wikitext: WikitextSettings = section(WikitextSettings, "WikiText-103")
    fineweb_edu: FinewebEduSettings = section(FinewebEduSettings, "FineWeb-Edu")
    gutenberg: GutenbergSettings = section(GutenbergSettings, "Project Gutenberg")
    roam: RoamSettings = section(RoamSettings, "your notes")
    text: TextSettings = section(TextSettings, "your text files")
    chitchat: ChitchatSettings = section(ChitchatSettings, "human small talk")
    primer: PrimerSettings = section(PrimerSettings, "the chat primer")
    dolly: DollySettings = section(DollySettings, "Dolly 15k")
    oasst1: Oasst1Settings = section(Oasst1Settings, "OpenAssistant conversations")

    @field_validator("mix_pretrain")
    @classmethod
    def _pretrain_mix(cls, mix: Mix) -> Mix:
        return checked_mix(mix, PRETRAIN_SOURCES)

    @field_validator("mix_sft")
    @classmethod
    def _sft_mix(cls, mix: Mix) -> Mix:
        return checked_mix(mix, SFT_SOURCES)


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


class AttentionSettings(Section):
    use_kv_cache: bool = knob(True, "generate with cached keys and values instead of full forwards")


class ModelSettings(Section):
    V: int = knob(16000, "vocabulary size: ids are 0..V-1", ge=1, le=65535)
    T: int = knob(512, "context length, tokens", ge=1, le=2**20)
    C: int = knob(384, "residual width", ge=1, le=2**16)
    L: int = knob(8, "number of blocks", ge=1, le=1024)
    H: int = knob(6, "attention heads; C/H must be whole and even", ge=1, le=2**15)
    d_ff: int = knob(1152, "MLP width", ge=1, le=2**18)
    dropout: float = knob(0.1, "dropout probability in training", ge=0, lt=1)
    rope_theta: float = knob(10000.0, "base of the rotary angles", ge=1, le=1e12)
    norm_type: Literal["rmsnorm", "layernorm"] = knob("rmsnorm", "layernorm is that of the published byte models")
    mlp_type: Literal["swiglu", "gelu"] = knob("swiglu", "gelu is that of the published byte models")
    mlp_bias: bool = knob(False, "biases in the MLP, as both published generations have")
    qk_norm: bool = knob(True, "normalise each head's queries and keys before the rotation")
    attention: AttentionSettings = section(AttentionSettings, "attention at generation time")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        model_config_of(self)
        return self


class PhaseSettings(Section):
    """One phase of training, with the defaults of pretraining."""

    seed: int = knob(42, "seed of weights, data order and dropout", ge=0, le=MAX_INT64)
    micro_B: int = knob(16, "rows of one microbatch", ge=1, le=2**20)
    accum_steps: int = knob(1, "microbatches per optimizer step", ge=1, le=2**20)
    total_steps: int = knob(17000, "optimizer steps", ge=1, le=MANY)
    minutes: float | None = knob(None, "time budget instead of total_steps; null = total_steps", gt=0, le=525600)
    eval_every: int = knob(200, "steps between evaluations", ge=1, le=MANY)
    eval_steps: int = knob(50, "batches of one evaluation", ge=1, le=MANY)
    eval_batches: int | None = knob(None, "overrides eval_steps when set", ge=1, le=MANY)
    micro_B_eval: int | None = knob(None, "rows of an evaluation batch; null = micro_B", ge=1, le=2**20)
    log_every: int = knob(50, "steps between log lines", ge=1, le=MANY)
    ckpt_every: int = knob(1000, "steps between checkpoints", ge=1, le=MANY)
    keep_last: int = knob(3, "step checkpoints to keep", ge=2, le=MANY)
    optimizer: Literal["adamw", "muon"] = knob("adamw", "muon = Muon for block matrices, AdamW for the rest")
    base_lr: float = knob(3e-4, "peak learning rate of AdamW", gt=0, le=10)
    warmup_steps: int = knob(340, "steps of linear warm-up", ge=0, le=MANY)
    min_lr: float = knob(3e-5, "learning rate at the end", ge=0, le=10)
    lr_shape: Literal["cosine", "linear"] = knob(
        "cosine", "linear = constant, then linear to min_lr over decay_fraction"
    )
    decay_fraction: float = knob(0.6, "share of the run in which a linear schedule decays", gt=0, le=1)
    weight_decay: float = knob(0.1, "weight decay of AdamW", ge=0, le=10)
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = knob((0.9, 0.95), "AdamW's averaging factors")
    eps: float = knob(1e-8, "AdamW's epsilon", gt=0, le=1)
    decay_norm_and_bias: bool = knob(True, "weight decay on norms and biases as well")
    decay_embeddings: bool = knob(True, "weight decay on the embedding as well")
    muon_lr: float = knob(0.015, "peak learning rate of Muon", gt=0, le=10)
    muon_momentum: float = knob(0.95, "momentum of Muon", ge=0, lt=1)
    muon_weight_decay: float = knob(0.0, "weight decay of Muon", ge=0, le=10)
    grad_clip: float = knob(1.0, "largest gradient norm", gt=0, le=1e9)
    amp: Amp = knob("auto", "mixed precision; auto = where this device is known to gain")
    amp_dtype: Literal["fp16", "bf16", "fp32"] = knob("fp16", "16-bit type when amp is true")
    activation_checkpointing: bool = knob(False, "recompute activations in the backward pass to save memory")
    compile: bool = knob(False, "compile the model with torch.compile")
    save_best: bool = knob(True, "keep best.pt")
    best_metric: Metric = knob("pretrain_val_loss", "what best.pt minimises")
    best_metric_weights: MetricWeights | None = knob(None, "weight of each loss when best_metric is weighted")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than total_steps={self.total_steps}; lower it")
        if self.min_lr > self.base_lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above base_lr={self.base_lr:g}; lower min_lr")
        if (self.best_metric == "weighted") != bool(self.best_metric_weights):
            raise ValueError('best_metric "weighted" and best_metric_weights need each other; set both or neither')
        return self


class SftPhaseSettings(PhaseSettings):
    """Fine-tuning: shorter and gentler."""

    total_steps: int = knob(1889, "optimizer steps", ge=1, le=MANY)
    base_lr: float = knob(1e-4, "peak learning rate of AdamW", gt=0, le=10)
    warmup_steps: int = knob(189, "steps of linear warm-up", ge=0, le=MANY)
    min_lr: float = knob(1e-5, "learning rate at the end", ge=0, le=10)
    weight_decay: float = knob(0.05, "weight decay of AdamW", ge=0, le=10)
    best_metric: Metric = knob("sft_val_loss", "what best.pt minimises")


class TrainingSettings(Section):
    pretrain: PhaseSettings = section(PhaseSettings, "pretraining")
    sft: SftPhaseSettings = section(SftPhaseSettings, "fine-tuning")

    @field_validator("pretrain")
    @classmethod
    def _measurable(cls, pretrain: PhaseSettings) -> PhaseSettings:
        if pretrain.best_metric != "pretrain_val_loss":
            raise ValueError(f'best_metric must be "pretrain_val_loss": pretraining measures no {pretrain.best_metric}')
        return pretrain


class SftFormatSettings(Section):
    include_eot_in_loss: bool = knob(True, "learn to end the turn")
    pack_sequences: bool = knob(True, "pack several chats into one row, each seeing only itself")
    ban_role_tokens_during_generation: bool = knob(True, "never sample the ids that open turns")


class GenerationSettings(Section):
    max_new_tokens: int = knob(256, "longest reply, tokens", ge=1, le=MANY)
    temperature: float = knob(0.9, "0 = always the likeliest token", ge=0, le=100)
    top_k: int | None = knob(50, "sample among the k likeliest; 0 or null = all", ge=0, le=MANY)
    top_p: float | None = knob(
        None, "sample among the likeliest of this total probability; 0 or null = all", ge=0, le=1
    )
    repetition_penalty: float | None = knob(None, "divide the odds of tokens already seen; null = off", gt=0, le=100)
    stop_token_id: int | None = knob(None, "id that ends a reply; null = the end-of-turn sentinel", ge=0, le=65534)
    banned_token_ids: TokenIds | None = knob(None, "ids never sampled; null = the role sentinels")


class ModelDims(Section):
    C: int = knob(384, "residual width", ge=1, le=2**16)
    L: int = knob(8, "number of blocks", ge=1, le=1024)
    H: int = knob(6, "attention heads", ge=1, le=2**15)


DIMS = (ModelDims(), ModelDims(C=512, L=8, H=8), ModelDims(C=512, L=12, H=8))


class BenchmarkSettings(Section):
    candidate_T: Sizes = knob((512, 1024), "context lengths to try", min_length=1)
    candidate_model_dims: Annotated[tuple[ModelDims, ...], Strict(False)] = knob(DIMS, "model sizes to try")
    checkpointing_modes: Annotated[tuple[bool, ...], Strict(False)] = knob((False, True), "checkpointing off and on")
    timeout_s: float = knob(20.0, "longest trial, seconds", gt=0, le=86400)
    steps_warmup: int = knob(2, "untimed steps of a trial", ge=0, le=MANY)
    steps_measure: int = knob(10, "timed steps of a trial", ge=1, le=MANY)
    max_micro_B: int = knob(256, "largest microbatch to try", ge=1, le=2**20)
    seed: int = knob(42, "seed of a trial", ge=0, le=MAX_INT64)


class ReproducibilitySettings(Section):
    torch_num_threads: int | None = knob(None, "CPU threads of PyTorch; null = its own choice", ge=1, le=4096)
    torch_matmul_precision: MatmulPrecision | None = knob(None, "float32 matmul precision; null = PyTorch's default")
    dataset_shuffle_buffer_size: int = knob(
        10000, "documents in the shuffle buffer of a streamed source", ge=1, le=MANY
    )


class Settings(Section):
    tokenizer: TokenizerSettings = section(TokenizerSettings, "text to ids")
    data: DataSettings = section(DataSettings, "what is learnt from")
    model: ModelSettings = section(ModelSettings, "shape of the network")
    training: TrainingSettings = section(TrainingSettings, "how it learns")
    sft_format: SftFormatSettings = section(SftFormatSettings, "how chats become rows")
    generation: GenerationSettings = section(GenerationSettings, "how it answers")
    benchmark: BenchmarkSettings = section(BenchmarkSettings, "what the benchmark tries")
    reproducibility: ReproducibilitySettings = section(ReproducibilitySettings, "threads and buffers")

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        V, gen = self.model.V, self.generation
        if self.tokenizer.type == "byte":
            if V != BYTE_VOCABULARY:
                raise ValueError(f"model.V={V} must be {BYTE_VOCABULARY} when tokenizer.type is byte")
            named: dict[str, int] = {}
        else:
            ids = self.tokenizer.expected_special_token_ids.model_dump()
            named = {f"tokenizer.expected_special_token_ids.{name}": i for name, i in ids.items()}
        if gen.stop_token_id is not None:
            named["generation.stop_token_id"] = gen.stop_token_id
        named |= {f"generation.banned_token_ids.{n}": i for n, i in enumerate(gen.banned_token_ids or ())}
        for name, token_id in named.items():
            if token_id >= V:
                raise ValueError(f"{name}={token_id} does not fit model.V={V}; ids are 0..V-1")
        return self


def model_config_of(model: ModelSettings) -> ModelConfig:
    """The eight numbers of the network; ValueError when they do not fit together."""
    return ModelConfig(**{name: getattr(model, name) for name in ModelConfig.__dataclass_fields__})


def train_config_of(phase: PhaseSettings) -> TrainConfig:
    """The 27 values a checkpoint records of a phase."""
    renamed: dict[str, Any] = {"B": phase.micro_B, "beta1": phase.betas[0], "beta2": phase.betas[1]}
    names = TrainConfig.__dataclass_fields__
    return TrainConfig(**{name: renamed[name] if name in renamed else getattr(phase, name) for name in names})


def default_settings() -> Settings:
    """The settings of a run without overrides."""
    return Settings()


def load_overrides(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """A JSON file's object, or a dict, as settings-shaped overrides; None = no overrides.

    A top-level text `_why` is dropped. Old config layouts are translated, with warnings on stderr.

    Raises: FileNotFoundError, or ValueError for what is no JSON object or cannot be translated.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        given: Any = dict(source)
    else:
        given = _read_object(source)
    if not isinstance(given, dict):
        raise ValueError(f'{source} must hold a JSON object such as {{"model": {{"L": 4}}}}')
    if isinstance(given.get("_why", ""), str):
        given.pop("_why", None)
    overrides, warnings = translate(given)
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return overrides


def _read_object(source: Any) -> Any:
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"overrides must be a dict or the path of a JSON file, not {type(source).__name__}")
    path = Path(source)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path}; see configs/ for examples")
    return files.read_json(path)


def validate_overrides(overrides: Mapping[str, Any]) -> Settings:
    """Defaults with `overrides` merged in; ValueError with one line per problem."""
    problems = key_problems(Settings, overrides)
    if problems:
        raise one_error(problems)
    try:
        return Settings.model_validate(overrides)
    except ValidationError as error:
        raise one_error(reworded(error)) from None


@dataclass(frozen=True)
class ResolvedSettings:
    """Everything one phase of one run goes by."""

    settings: Settings
    model_cfg: ModelConfig
    arch: Architecture
    train_cfg: TrainConfig
    special_token_ids: dict[str, int]  # {} for byte tokenizers
    stop_token_id: int | None
    banned_token_ids: tuple[int, ...]
    phase: str
    overrides: dict[str, Any]
    overrides_source: str | None
    run_id: str
    resolved_path: Path | None  # None unless written
    tokenizer_sha256: str | None
    tokenizer_meta: dict[str, Any]
    generated_at_utc: str

    @property
    def training(self) -> PhaseSettings:
        """The settings of this phase."""
        return self.settings.training.pretrain if self.phase == "pretrain" else self.settings.training.sft

    def record(self) -> dict[str, Any]:
        """The content of resolved_settings.json, plain JSON values."""
        return {
            "run_id": self.run_id,
            "phase": self.phase,
            "generated_at_utc": self.generated_at_utc,
            "overrides_source": self.overrides_source,
            "overrides": self.overrides,
            "settings": self.settings.model_dump(mode="json"),
            "model_cfg": to_dict(self.model_cfg),
            "arch": to_dict(self.arch),
            "train_cfg": to_dict(self.train_cfg),
            "special_token_ids": self.special_token_ids,
            "stop_token_id": self.stop_token_id,
            "banned_token_ids": list(self.banned_token_ids),
            "tokenizer": {
                "model_path": self.settings.tokenizer.model_path,
                "sha256": self.tokenizer_sha256,
                "special_tokens": self.settings.tokenizer.special_tokens,
                "meta": self.tokenizer_meta,
            },
        }


def resolve_settings(
    phase: str,
    overrides: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    overrides_path: str | os.PathLike[str] | None = None,
    run_id: str | None = None,
    write_resolved: bool = False,
) -> ResolvedSettings:
    """Settings of one phase from a dict or a file of overrides; optionally recorded under `paths.RUNS_DIR/<run_id>/`.

    Raises: FileNotFoundError for a missing file, ValueError (one line per problem) for everything else that is wrong.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r:.80}")
    if overrides is not None and overrides_path is not None:
        raise ValueError("give overrides or overrides_path, not both")
    source = overrides_path if overrides is None else overrides
    given = load_overrides(source)
    settings = validate_overrides(given)
    run_id = run_id or new_run_id()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run_id):
        raise ValueError(f"run_id {run_id!r:.80} must be letters, digits, '.', '_' and '-': it names a folder")
    tokenizer = settings.tokenizer
    has_specials = tokenizer.type != "byte"
    if has_specials and tokenizer.vocab_size > settings.model.V:
        print(
            f"warning: tokenizer.vocab_size={tokenizer.vocab_size} is more than model.V={settings.model.V}: "
            "a text with an id of V or above cannot be trained on",
            file=sys.stderr,
        )
    ids: dict[str, int] = tokenizer.expected_special_token_ids.model_dump() if has_specials else {}
    model = settings.model
    resolved_path = paths.RUNS_DIR / run_id / "resolved_settings.json" if write_resolved else None
    training = settings.training.pretrain if phase == "pretrain" else settings.training.sft
    resolved = ResolvedSettings(
        settings=settings,
        model_cfg=model_config_of(model),
        arch=Architecture(model.norm_type, model.mlp_type, model.mlp_bias, model.qk_norm),
        train_cfg=train_config_of(training),
        special_token_ids=ids,
        stop_token_id=_stop_token_id(settings, ids),
        banned_token_ids=_banned_token_ids(settings, ids),
        phase=phase,
        overrides=json.loads(json.dumps(given, default=os.fspath)),
        overrides_source=None if source is None or isinstance(source, Mapping) else os.fspath(source),
        run_id=run_id,
        resolved_path=resolved_path,
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        tokenizer_meta={**PIECE_IDS, "expected_special_token_ids": ids} if has_specials else {},
        generated_at_utc=datetime.now(UTC).isoformat(),
    )
    if resolved_path is not None:
        files.write_json(resolved_path, resolved.record())
    return resolved


def new_run_id() -> str:
    """UTC `YYYYmmdd-HHMMSS-` and 8 random hex digits."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def tokenizer_file(tokenizer: TokenizerSettings) -> Path | None:
    """The model file: `model_path` under the current directory, else beside the package; None if there is none."""
    if tokenizer.type == "byte":
        return None
    candidates = (Path(tokenizer.model_path), paths.PROJECT_ROOT / tokenizer.model_path)
    return next((path for path in candidates if path.is_file()), None)


def _tokenizer_sha256(tokenizer: TokenizerSettings) -> str | None:
    expected = tokenizer.tokenizer_sha256
    try:
        path = tokenizer_file(tokenizer)
        found = files.sha256_file(path) if path is not None else None
    except OSError as error:
        raise ValueError(f"tokenizer.model_path: cannot be read: {error.strerror}") from None
    if found is None:
        return expected
    if expected is not None and found != expected:
        raise ValueError(
            f"tokenizer hash mismatch: {path} has sha256 {found}, tokenizer.tokenizer_sha256 expects {expected}; "
            "put the right file there or correct the setting"
        )
    return found


def _stop_token_id(settings: Settings, ids: Mapping[str, int]) -> int | None:
    asked = settings.generation.stop_token_id
    return asked if asked is not None else ids.get("eot")


def _banned_token_ids(settings: Settings, ids: Mapping[str, int]) -> tuple[int, ...]:
    asked = settings.generation.banned_token_ids
    if asked is not None:
        return asked
    if not settings.sft_format.ban_role_tokens_during_generation:
        return ()
    return tuple(ids[name] for name in ("sys", "usr", "asst") if name in ids)
