"""The typed form of the configuration: frozen pydantic models, one per YAML file.

What each key means stands beside it in `config/*.yaml`; here stand its type, its bounds and the combinations that make
no sense. Defaults live in the YAML files alone, so a key missing there is an error here (only a source, of which a user
may add any number, has defaults of its own; see `config.sources`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.deduplication import (
    DecontaminationConfig,
    LineDeduplicationConfig,
    MixtureConfig,
    NearDeduplicationConfig,
)
from config.model import ModelConfig
from config.quality import LanguageConfig, QualityConfig
from config.section import Fraction, OffIsAWord, PositiveInt, Rate, Section, divisors
from config.sources import PublishedSection, SourceConfig
from config.training import TrainingConfig


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
    html: Annotated[Literal["off", "pages", "all"], OffIsAWord]
    whitespace: bool
    mask_emails: bool
    mask_ips: bool
    keep_code: bool


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
    packing: Literal["contiguous", "best_fit"]


class FinetuningConfig(Section):
    """How examples become samples; see `data.examples`."""

    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    packing: bool
    too_long: Literal["refuse", "truncate", "drop"]
    before_after: Annotated[int, Field(ge=0)]


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
    typical_p: Annotated[float, Field(gt=0.0, le=1.0)]
    repetition_penalty: Rate
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)]
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)]
    logit_bias: dict[Annotated[int, Field(ge=0)] | str, Annotated[float, Field(ge=-100.0, le=100.0)]]
    json_schema: str | None
    regex: str | None
    stop: list[str]
    stop_tokens: list[Annotated[int, Field(ge=0)] | str]
    context: Literal["auto", "slide", "stop"]
    seed: int | None
    num_samples: PositiveInt
    beams: PositiveInt
    length_penalty: Annotated[float, Field(ge=-10.0, le=10.0)]
    early_stopping: bool
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    quantize: Literal["none", "int8", "int4"]
    compile: bool
    context_length: PositiveInt | None
    prompt_lookup_tokens: Annotated[int, Field(ge=0, le=64)]

    @model_validator(mode="after")
    def _combinations(self) -> GenerationConfig:
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("regex: a text has one form; set regex or json_schema, not both")
        if 1 < self.beams < self.num_samples:
            raise ValueError(f"num_samples: {self.beams} beams find no more than {self.beams} texts")
        return self


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
        targets = self.training.adapter.targets
        if "gate" in targets and self.model.activation != "swiglu":
            raise ValueError(f"training.adapter.targets: model.activation={self.model.activation} has no gate")
        if length % (self.training.short_sequences.length or 1):
            raise ValueError(
                f"training.short_sequences.length: {self.training.short_sequences.length} does not divide the "
                f"sequences of {length} tokens; choose from {divisors(length)}"
            )
        return self
