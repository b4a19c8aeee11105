"""The typed form of the configuration: frozen pydantic models, one per YAML file.

What each key means stands beside it in `config/*.yaml`; here stand its type, its bounds and the combinations that make
no sense. Defaults live in the YAML files alone, so a key missing there is an error here (only a source, of which a user
may add any number, has defaults of its own; see `config.sources`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from config.deduplication import (
    DecontaminationConfig,
    LineDeduplicationConfig,
    MixtureConfig,
    NearDeduplicationConfig,
)
from config.quality import LanguageConfig, QualityConfig
from config.section import Fraction, PositiveInt, Rate, Section
from config.sources import PublishedSection, SourceConfig


class ModelConfig(Section):
    """Shape and parts of the transformer."""

    variant: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None
    d_model: PositiveInt
    d_ff: PositiveInt | None
    context_length: PositiveInt
    vocab_size: PositiveInt | None
    position: Literal["learned", "rope"]
    rope_theta: Rate
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: Rate
    activation: Literal["gelu", "swiglu", "squared_relu"]
    bias: bool
    tie_embeddings: bool
    qk_norm: bool
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    init_std: Rate
    zero_init_projections: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; fewer than `n_heads` is grouped-query attention."""
        return self.n_kv_heads or self.n_heads

    @property
    def feed_forward_dim(self) -> int:
        """Hidden width of the feed-forward layer; `d_ff: null` means four times `d_model`."""
        return self.d_ff or 4 * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128, which matrix kernels like."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: it comes from the tokenizer")
        return -(-self.vocab_size // 128) * 128

    @model_validator(mode="after")
    def _combinations(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads: d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"choose n_heads from {divisors(self.d_model)}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads: n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"choose n_kv_heads from {divisors(self.n_heads)}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"n_heads: rotary positions need an even head width, but d_model / n_heads = {self.head_dim}; "
                "choose another n_heads, or position: learned"
            )
        return self


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


class AdamWConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019): for every parameter, or beside Muon for all that is not a hidden matrix."""

    learning_rate: Rate
    beta1: Fraction
    beta2: Fraction
    eps: Rate
    weight_decay: Annotated[float, Field(ge=0.0)]


class MuonConfig(Section):
    """Muon (Jordan et al., 2024): momentum orthogonalised by Newton-Schulz steps, for the hidden matrices."""

    learning_rate: Rate
    momentum: Fraction
    newton_schulz_steps: PositiveInt
    weight_decay: Annotated[float, Field(ge=0.0)]


class ScheduleConfig(Section):
    """The learning rate over the course of the run, as a factor of each group's own rate."""

    name: Literal["cosine", "wsd", "constant"]
    warmup_steps: Annotated[int, Field(ge=0)]
    decay_fraction: Fraction
    final_fraction: Fraction


class ShortSequencesConfig(Section):
    """Short sequences first: each window is cut into pieces of `length` tokens for the first part of the run."""

    length: PositiveInt | None
    fraction: Fraction


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"]
    project: str

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, mode: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if mode is False else mode


class TrainingConfig(Section):
    """One run of the training loop."""

    run_name: str | None
    runs_dir: str
    checkpoint_dir: str
    seed: Annotated[int, Field(ge=0)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: Literal["auto", True, False]
    max_steps: PositiveInt | None
    epochs: Rate | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    sequence_length: PositiveInt | None
    short_sequences: ShortSequencesConfig
    gradient_checkpointing: Literal["none", "selective", "full"]
    optimizer: Literal["adamw", "muon"]
    adamw: AdamWConfig
    muon: MuonConfig
    schedule: ScheduleConfig
    gradient_clip: Annotated[float, Field(ge=0.0)]
    log_interval: PositiveInt
    eval_interval: PositiveInt
    eval_tokens: PositiveInt
    sample_interval: Annotated[int, Field(ge=0)]
    sample_prompt: str
    checkpoint_interval: PositiveInt
    keep_last: PositiveInt
    keep_best: bool
    wandb: WandbConfig

    @model_validator(mode="after")
    def _combinations(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                "max_steps: set exactly one of max_steps and epochs, and the other one to null, "
                "such as training.max_steps=null training.epochs=3"
            )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: batch_size={self.batch_size} is not divisible by "
                f"micro_batch_size={self.micro_batch_size}; choose from {divisors(self.batch_size)}"
            )
        return self


class TokenizerConfig(Section):
    """How the tokenizer is trained, and which library encodes with it."""

    kind: Literal["bpe", "sentencepiece-unigram", "sentencepiece-bpe"]
    vocab_size: Annotated[int, Field(ge=256)]
    pattern: Literal["gpt2", "llama3"]
    special_tokens: list[str]
    max_training_bytes: PositiveInt
    encoder: Literal["auto", "tokenizers", "sentencepiece", "fastokens", "gigatoken"]


class CleanConfig(Section):
    """What is mended in every document."""

    unicode_nfc: bool
    control_characters: bool
    ftfy: bool
    html: Literal["off", "pages", "all"]
    whitespace: bool
    mask_emails: bool
    mask_ips: bool
    keep_code: bool

    @field_validator("html", mode="before")
    @classmethod
    def _off_is_a_word(cls, html: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if html is False else html


class FilterConfig(Section):
    """Which documents are dropped for their length, in characters."""

    min_characters: Annotated[int, Field(ge=0)]
    max_characters: PositiveInt


class PreprocessConfig(Section):
    """From documents to token files."""

    clean: CleanConfig
    filter: FilterConfig
    language: LanguageConfig
    quality: QualityConfig
    exact_deduplication: bool
    near_deduplication: NearDeduplicationConfig
    line_deduplication: LineDeduplicationConfig
    decontamination: DecontaminationConfig
    mixture: MixtureConfig
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    max_bad_fraction: Fraction
    workers: PositiveInt | None
    tasks: PositiveInt
    batch_documents: PositiveInt
    max_file_tokens: PositiveInt


class LoaderConfig(Section):
    """How batches reach the training loop."""

    prefetch_batches: PositiveInt


class FinetuningConfig(Section):
    """How examples become samples; see `data.examples`."""

    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    too_long: Literal["refuse", "truncate", "drop"]


class SlurmConfig(Section):
    """The jobs that preprocessing submits on a Slurm cluster."""

    partition: str | None
    time_hours: Rate
    memory_gb: Rate
    cpus: PositiveInt
    setup: list[str]
    options: dict[str, str | int | None]


class DataConfig(Section):
    """Everything before the model: where data lies, where it comes from, how it becomes tokens."""

    corpus_dir: str
    raw_dir: str
    tokenizer_dir: str
    tokens_dir: str
    executor: Literal["local", "ray", "slurm"]
    ray_address: str
    slurm: SlurmConfig
    seed: Annotated[int, Field(ge=0)]
    use: list[str]
    streaming: bool
    connections_per_host: PositiveInt
    sources: dict[str, SourceConfig]
    tokenizer: TokenizerConfig
    preprocess: PreprocessConfig
    loader: LoaderConfig
    finetuning: FinetuningConfig

    @model_validator(mode="after")
    def _combinations(self) -> DataConfig:
        unknown = [name for name in self.use if name not in self.sources]
        if unknown:
            raise ValueError(f"use: there is no source {unknown[0]!r}; choose from {', '.join(self.sources)}")
        self.preprocess.mixture.check(self.use)
        return self

    def streams(self, name: str) -> bool:
        """Whether the source `name` is read from where it is published, and not fetched first."""
        source = self.sources[name]
        if not isinstance(source, PublishedSection):
            return False
        return self.streaming if source.streaming is None else source.streaming


class GenerationConfig(Section):
    """How text is sampled from a model."""

    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0.0)]
    top_k: Annotated[int, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)]
    repetition_penalty: Rate
    stop: list[str]
    seed: int | None
    num_samples: PositiveInt


class Config(Section):
    """The whole configuration, one section per YAML file."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    generation: GenerationConfig

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        length = self.training.sequence_length or self.model.context_length
        if length > self.model.context_length:
            raise ValueError(
                f"training.sequence_length: {length} is longer than the model's context_length, "
                f"{self.model.context_length}"
            )
        if length % (self.training.short_sequences.length or 1):
            raise ValueError(
                f"training.short_sequences.length: {self.training.short_sequences.length} does not divide the "
                f"sequences of {length} tokens; choose from {divisors(length)}"
            )
        return self
