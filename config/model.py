"""The typed form of the model's shape and parts; what each key means stands in the YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from config.section import PositiveInt, Rate, Section, divisors


class RopeScaling(Section):
    """Llama 3's change of the rotary frequencies, for a context longer than that of the first training."""

    factor: Rate
    low_freq_factor: Rate
    high_freq_factor: Rate
    original_context_length: PositiveInt

    @model_validator(mode="after")
    def _order(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class ModelConfig(Section):
    """Shape and parts of the transformer."""

    variant: str
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None
    d_model: PositiveInt
    d_head: PositiveInt | None
    d_ff: PositiveInt | None
    context_length: PositiveInt
    vocab_size: PositiveInt | None
    position: Literal["learned", "rope"]
    rope_theta: Rate
    rope_scaling: RopeScaling | None
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: Rate
    activation: Literal["gelu", "swiglu", "squared_relu"]
    bias: bool
    tie_embeddings: bool
    qk_norm: bool | Literal["learned"]
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    init_std: Rate
    zero_init_projections: bool
    logit_soft_cap: Rate | None
    value_embeddings: Literal["none", "alternate", "all"]
    residual_scaling: bool
    window: PositiveInt | None
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")]

    @property
    def head_dim(self) -> int:
        """Width of one attention head; `d_head: null` means that all of them together are as wide as `d_model`."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; fewer than `n_heads` is grouped-query attention."""
        return self.n_kv_heads or self.n_heads

    @property
    def value_embedding_layers(self) -> list[int]:
        """The layers with a table of values of their own: `alternate` has the last one and every second before it."""
        step = {"none": self.n_layers + 1, "alternate": 2, "all": 1}[self.value_embeddings]
        return list(range(self.n_layers - 1, -1, -step))[::-1] if step <= self.n_layers else []

    @property
    def layer_windows(self) -> list[int | None]:
        """Of every layer, how many tokens a token sees, itself included; None is the whole context.

        The pattern is repeated over the layers, short windows at S, and the last layer sees everything.
        """
        letters = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layers - 1)]
        return [self.window if letter == "S" else None for letter in letters] + [None]

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
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads: d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"choose n_heads from {divisors(self.d_model)}, or set d_head"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads: n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}; "
                f"choose n_kv_heads from {divisors(self.n_heads)}"
            )
        if self.position == "rope" and self.head_dim % 2:
            width, other = f"d_head={self.d_head}", "d_head"
            if self.d_head is None:
                width, other = f"d_model / n_heads = {self.head_dim}", "n_heads"
            raise ValueError(
                f"{other}: rotary positions need an even head width, but {width}; "
                f"choose another {other}, or position: learned"
            )
        return self
