"""The typed form of the training loop's settings; what each key means stands in the YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.section import Fraction, OffIsAWord, PositiveInt, Rate, Section, divisors

AdapterTarget = Literal["query", "key", "value", "output", "gate", "up", "down"]


class AdamWConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019): for every parameter, or beside Muon for all that is not a hidden matrix."""

    learning_rate: Rate
    embedding_learning_rate: Rate | None
    head_learning_rate: Rate | None
    scalar_learning_rate: Rate | None
    beta1: Fraction
    beta2: Fraction
    eps: Rate
    weight_decay: Annotated[float, Field(ge=0.0)]


class MuonConfig(Section):
    """Muon (Jordan et al., 2024): momentum made orthogonal, for the hidden matrices."""

    learning_rate: Rate
    momentum: Fraction
    orthogonalisation: Literal["newton_schulz", "polar_express"]
    steps: PositiveInt
    second_moment: Annotated[float, Field(ge=0.0, lt=1.0)] | None
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


class BatchWarmupConfig(Section):
    """Fewer sequences in the first steps: `batch_size` grows from `sequences` in equal stages."""

    sequences: PositiveInt | None
    steps: Annotated[int, Field(ge=0)]


class EarlyStoppingConfig(Section):
    """Ending a run that gets no better."""

    patience: PositiveInt | None
    min_delta: Annotated[float, Field(ge=0.0)]


class AdapterConfig(Section):
    """Small matrices beside frozen ones, trained in place of them; see `training.adapters`."""

    method: Literal["lora", "dora"] | None
    rank: PositiveInt
    alpha: Rate
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    targets: Literal["all"] | Annotated[list[AdapterTarget], Field(min_length=1)]
    quantize: Literal["int8", "int4", "nf4"] | None

    @property
    def title(self) -> str:
        """The method as its papers write it; for one that is set."""
        return {"lora": "LoRA", "dora": "DoRA"}[str(self.method)]


class DPOConfig(Section):
    """Direct preference optimisation (Rafailov et al., 2023)."""

    beta: Rate
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)]


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Annotated[Literal["auto", "online", "offline", "off"], OffIsAWord]
    project: str


class TrainingConfig(Section):
    """One run of the training loop."""

    run_name: str | None
    runs_dir: str
    checkpoint_dir: str
    seed: Annotated[int, Field(ge=0)]
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    fp8: bool
    deterministic: bool
    compile: Literal["auto", True, False]
    parallelism: Literal["ddp", "fsdp", "hsdp"]
    shard_group: PositiveInt | None
    tensor_parallel: PositiveInt
    max_steps: PositiveInt | None
    epochs: Rate | None
    max_hours: Rate | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"]
    batch_warmup: BatchWarmupConfig
    sequence_length: PositiveInt | None
    short_sequences: ShortSequencesConfig
    documents: Literal["attend_across", "masked"]
    gradient_checkpointing: Literal["none", "selective", "full"]
    adapter: AdapterConfig
    objective: Literal["next_token", "dpo"]
    dpo: DPOConfig
    optimizer: Literal["adamw", "muon"]
    learning_rate: Literal["auto"] | None
    adamw: AdamWConfig
    muon: MuonConfig
    cautious_weight_decay: bool
    schedule: ScheduleConfig
    gradient_clip: Annotated[float, Field(ge=0.0)]
    spike_factor: Annotated[float, Field(gt=1.0)] | None
    max_skipped_in_a_row: PositiveInt
    z_loss: Annotated[float, Field(ge=0.0)]
    price_per_device_hour: Rate | None
    log_interval: PositiveInt
    eval_interval: PositiveInt
    eval_tokens: PositiveInt
    task_interval: PositiveInt | None
    task_questions: PositiveInt
    sample_interval: Annotated[int, Field(ge=0)]
    sample_prompt: str
    checkpoint_interval: PositiveInt
    keep_last: PositiveInt
    keep_every: PositiveInt | None
    keep_best: bool
    best_metric: Literal["validation_loss", "task_accuracy"]
    early_stopping: EarlyStoppingConfig
    save_in_background: bool
    wandb: WandbConfig

    @model_validator(mode="after")
    def _combinations(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                "max_steps: set exactly one of max_steps and epochs, and the other one to null, "
                "such as training.max_steps=null training.epochs=3"
            )
        self._check_adapter()
        if self.best_metric == "task_accuracy" and self.task_interval is None:
            raise ValueError("best_metric: task_accuracy is measured where task_interval is set, such as to 1000")
        if self.early_stopping.patience is not None and not self.keep_best:
            raise ValueError(
                "early_stopping.patience: what is worth keeping then is the best checkpoint; set keep_best to true"
            )
        if self.fp8 and self.tensor_parallel > 1:
            raise ValueError("fp8: goes with tensor_parallel=1 alone")
        if self.objective == "dpo" and self.tensor_parallel > 1:
            raise ValueError("objective: dpo goes with tensor_parallel=1 alone")
        if self.objective == "dpo" and self.z_loss:
            raise ValueError("z_loss: goes with objective=next_token alone; set it to 0.0")
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: batch_size={self.batch_size} is not divisible by "
                f"micro_batch_size={self.micro_batch_size}; choose from {divisors(self.batch_size)}"
            )
        if self.batch_size % (self.batch_warmup.sequences or 1):
            raise ValueError(
                f"batch_warmup.sequences: batch_size={self.batch_size} is not a multiple of "
                f"{self.batch_warmup.sequences}; choose from {divisors(self.batch_size)}"
            )
        return self

    def _check_adapter(self) -> None:
        if self.adapter.method is None:
            if self.adapter.quantize is not None:
                raise ValueError(
                    "adapter.quantize: a quantized model is trained by an adapter alone: set adapter.method"
                )
            return
        if self.optimizer == "muon":
            # Each of the two thin factors made orthogonal by itself is not an orthogonal step of their product.
            raise ValueError("optimizer: adapters are trained by adamw")
        if self.parallelism != "ddp" or self.tensor_parallel > 1:
            raise ValueError("parallelism: adapters are trained with parallelism=ddp and tensor_parallel=1 alone")
        if self.fp8:
            raise ValueError("fp8: adapters are trained with fp8=false alone")
