"""What the parts of a model are called in Hugging Face's `transformers`, for every architecture that goes both ways.

GPT-2 has learned positions, Llama and its kin rotary ones. Of the kin, Qwen3 normalises queries and keys, Arcee has a
squared ReLU, and Apertus both. Their normalisation of queries and keys has a learned scale, which may be 1 here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from config.model import ModelConfig

_LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_UNGATED = {here: there for here, there in _LLAMA_BLOCK.items() if here != "feed_forward.gate"}
_APERTUS_NORMS = {"attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm"}
_QK_NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}


class Kin(NamedTuple):
    """An architecture with rotary positions: what it is called, what its blocks are called, and how they differ."""

    name: str
    block: dict[str, str]
    activation: Literal["swiglu", "squared_relu"]
    qk_norm: bool
    options: tuple[str, ...]
    """Settings of its configuration that others lack."""


LLAMA = Kin("Llama", _LLAMA_BLOCK, "swiglu", False, ("head_dim", "mlp_bias"))
KIN = (
    LLAMA,
    Kin("Mistral", _LLAMA_BLOCK, "swiglu", False, ("head_dim",)),
    Kin("Qwen3", _LLAMA_BLOCK, "swiglu", True, ("head_dim",)),
    Kin("Arcee", _UNGATED, "squared_relu", False, ("head_dim", "mlp_bias")),
    Kin("Apertus", _UNGATED | _APERTUS_NORMS, "squared_relu", True, ()),
)
CLASSES = ("GPT2LMHeadModel", *(f"{kin.name}ForCausalLM" for kin in KIN))
"""The classes of `transformers` that go both ways."""
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
QKV = ("query", "key", "value")
VOCABULARY_TABLES = ("token_embedding.weight", "head.weight")


def scales(kin: Kin, config: ModelConfig) -> list[str]:
    """Names of the scales of queries and keys that are there."""
    norms = _QK_NORMS.values() if kin.qk_norm else ()
    return [f"model.layers.{layer}.{norm}.weight" for layer in range(config.n_layers) for norm in norms]


def kin_names(kin: Kin, config: ModelConfig) -> dict[str, str]:
    """Name of every weight here, and its name there."""
    names = {"token_embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    block = kin.block | (_QK_NORMS if config.qk_norm == "learned" else {})
    for layer in range(config.n_layers):
        for here, there in block.items():
            kinds = ("weight", "bias") if config.bias and not here.endswith("norm") else ("weight",)
            for kind in kinds:
                names[f"blocks.{layer}.{here}.{kind}"] = f"model.layers.{layer}.{there}.{kind}"
    return names


def gpt2_names(config: ModelConfig) -> dict[str, str]:
    """Name of every layer here, and its name in `GPT2LMHeadModel`, but for the fused query, key and value."""
    names = {"final_norm": "transformer.ln_f"}
    for layer in range(config.n_layers):
        for here, there in _GPT2_BLOCK.items():
            names[f"blocks.{layer}.{here}"] = f"transformer.h.{layer}.{there}"
    return names
