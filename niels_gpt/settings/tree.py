"""The tree of every knob: model, training, chat format, generation, benchmark; `data` has those of text."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.settings.data import BYTE_VOCABULARY, DataSettings, TokenizerSettings
from niels_gpt.settings.fields import (
    MANY,
    MAX_ID,
    MAX_INT64,
    MAX_VOCAB_SIZE,
    Beta,
    Section,
    Sizes,
    Text,
    TokenIds,
    knob,
    section,
)

MatmulPrecision = Literal["highest", "high", "medium"]
Metric = Literal["pretrain_val_loss", "sft_val_loss", "weighted"]
Weights = Literal["fp32", "fp16", "int8"]
MetricWeights = dict[Literal["pretrain_val_loss", "sft_val_loss"], Annotated[float, Field(gt=0, le=1e6)]]


def _not_a_number(value: Any) -> Any:
    """Literal[True] would take 1; the error message shows the text instead."""
    return repr(value) if type(value) in (int, float) else value


Amp = Annotated[Literal[True, False, "auto"], BeforeValidator(_not_a_number)]


class AttentionSettings(Section):
    use_kv_cache: bool = knob(True, "generate with cached keys and values instead of full forwards")


class ModelSettings(Section):
    V: int = knob(16000, "vocabulary size: ids are 0..V-1", ge=1, le=MAX_VOCAB_SIZE)
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
    sample_prompt: Text | None = knob("Once upon a time", "continued at every evaluation; null = no sample text")
    sample_tokens: int = knob(40, "longest sample text, tokens", ge=1, le=MANY)
    tensorboard: bool = knob(True, "write TensorBoard files, if the extra `board` is installed")
    ckpt_every: int = knob(1000, "steps between checkpoints", ge=1, le=MANY)
    keep_last: int = knob(3, "step checkpoints to keep", ge=2, le=MANY)
    keep_every: int | None = knob(None, "keep the checkpoints of every such step for good as well", ge=1, le=MANY)
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
    parallel: Literal["ddp", "fsdp"] = knob("ddp", "under torchrun: ddp copies the model, fsdp shards it")
    silence_s: float = knob(10.0, "under torchrun: seconds without a sign of life that end the job", ge=3, le=86400)
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

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all its microbatches."""
        return self.micro_B * self.accum_steps


class SftPhaseSettings(PhaseSettings):
    """Fine-tuning: shorter and gentler."""

    total_steps: int = knob(1889, "optimizer steps", ge=1, le=MANY)
    base_lr: float = knob(1e-4, "peak learning rate of AdamW", gt=0, le=10)
    warmup_steps: int = knob(189, "steps of linear warm-up", ge=0, le=MANY)
    min_lr: float = knob(1e-5, "learning rate at the end", ge=0, le=10)
    weight_decay: float = knob(0.05, "weight decay of AdamW", ge=0, le=10)
    sample_prompt: Text | None = knob("what is your name?", "answered at every evaluation; null = no sample text")
    best_metric: Metric = knob("sft_val_loss", "what best.pt minimises")


class TrainingSettings(Section):
    pretrain: PhaseSettings = section(PhaseSettings, "pretraining")
    sft: SftPhaseSettings = section(SftPhaseSettings, "fine-tuning")
    native_kernels: bool = knob(
        True, "train with compiled code on a CPU where a C++ compiler is found; false = PyTorch only"
    )
    sft_share: float = knob(0.1, "fine-tuning's share of a pipeline's --minutes or --until", gt=0, lt=1)

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
    min_p: float | None = knob(
        None, "drop tokens below this share of the likeliest one's probability; 0 or null = off", ge=0, le=1
    )
    repetition_penalty: float | None = knob(None, "divide the odds of tokens already seen; null = off", gt=0, le=100)
    weights: Weights = knob("fp32", "matrices while replying on a CPU: fp16 and int8 are faster, int8 a little worse")
    native_decoder: bool = knob(True, "reply with compiled code where a C++ compiler is found; false = PyTorch only")
    stop_token_id: int | None = knob(None, "id that ends a reply; null = the end-of-turn sentinel", ge=0, le=MAX_ID)
    banned_token_ids: TokenIds | None = knob(None, "ids never sampled; null = the role sentinels")


class ModelDims(Section):
    C: int = knob(384, "residual width", ge=1, le=2**16)
    L: int = knob(8, "number of blocks", ge=1, le=1024)
    H: int = knob(6, "attention heads", ge=1, le=2**15)


DIMS = (ModelDims(), ModelDims(C=512, L=8, H=8), ModelDims(C=512, L=12, H=8))
CPU_DIMS = (ModelDims(C=256, L=4, H=4),)


class BenchmarkSettings(Section):
    candidate_T: Sizes = knob((512, 1024), "context lengths to try", min_length=1)
    candidate_model_dims: Annotated[tuple[ModelDims, ...], Strict(False)] = knob(
        DIMS, "model sizes to try, small ones first: below 16 GiB of GPU memory two of them, below 10 GiB one"
    )
    small_T: Sizes = knob((256, 512), "context lengths to try below 16 GiB of GPU memory", min_length=1)
    cpu_T: Sizes = knob((128,), "context lengths to try on a CPU", min_length=1)
    cpu_model_dims: Annotated[tuple[ModelDims, ...], Strict(False)] = knob(CPU_DIMS, "model sizes to try on a CPU")
    checkpointing_modes: Annotated[tuple[bool, ...], Strict(False)] = knob((False, True), "checkpointing off and on")
    timeout_s: float = knob(20.0, "longest trial, seconds", gt=0, le=86400)
    steps_warmup: int = knob(2, "untimed steps of a trial", ge=0, le=MANY)
    steps_measure: int = knob(10, "timed steps of a trial", ge=1, le=MANY)
    max_micro_B: int = knob(256, "largest microbatch to try", ge=1, le=2**20)
    seed: int = knob(42, "seed of a trial", ge=0, le=MAX_INT64)


PLAN_SIZES = tuple(
    ModelDims(C=width, L=layers, H=max(1, width // 64))
    for width, layers in (
        (64, 2),
        (96, 2),
        (128, 3),
        (128, 4),
        (192, 4),
        (256, 4),
        (256, 6),
        (320, 6),
        (384, 8),
        (512, 8),
        (640, 10),
        (768, 12),
        (1024, 16),
    )
)


class PlanSettings(Section):
    sizes: Annotated[tuple[ModelDims, ...], Strict(False)] = knob(
        PLAN_SIZES, "models a plan chooses from", min_length=1
    )
    probe_s: float = knob(60.0, "longest measurement before a plan, seconds", gt=0, le=3600)
    shown: int = knob(6, "candidates a plan shows", ge=1, le=100)


class ReproducibilitySettings(Section):
    torch_num_threads: int | None = knob(None, "CPU threads of PyTorch; null = its own choice", ge=1, le=4096)
    torch_matmul_precision: MatmulPrecision | None = knob(None, "float32 matmul precision; null = PyTorch's default")
    deterministic: bool = knob(
        False, "only kernels that repeat to the bit: on GPUs, for a resumed run that is exact, and slower"
    )
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
    plan: PlanSettings = section(PlanSettings, "what `niels-gpt plan` chooses from")
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
