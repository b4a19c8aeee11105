"""Weights to and from Hugging Face's `transformers`: GPT-2 for learned positions, Llama and its kin for rotary ones.

Of the kin, Qwen3 normalises queries and keys, Arcee has a squared ReLU, and Apertus both. Their normalisation of
queries and keys has a learned scale, which is 1 here. An option that the other side lacks is refused by name; nothing
is approximated. `transformers` is imported only when a function here is called.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config.earlier import BEFORE
from config.errors import UserError
from config.model import ModelConfig
from model.transformer import Transformer

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
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class _Kin(NamedTuple):
    """An architecture with rotary positions: what it is called, what its blocks are called, and how they differ."""

    name: str
    block: dict[str, str]
    activation: Literal["swiglu", "squared_relu"]
    qk_norm: bool
    options: tuple[str, ...]
    """Settings of its configuration that others lack."""


_LLAMA = _Kin("Llama", _LLAMA_BLOCK, "swiglu", False, ("head_dim", "mlp_bias"))
_KIN = (
    _LLAMA,
    _Kin("Qwen3", _LLAMA_BLOCK, "swiglu", True, ("head_dim",)),
    _Kin("Arcee", _UNGATED, "squared_relu", False, ("head_dim", "mlp_bias")),
    _Kin("Apertus", _UNGATED | _APERTUS_NORMS, "squared_relu", True, ()),
)
_ACTIVATIONS = {"swiglu": "silu", "squared_relu": "relu2"}
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_QKV = ("query", "key", "value")
_NEUTRAL = {key: value for key, value in BEFORE["model"].items() if key != "window_pattern"}
_VOCABULARY_TABLES = ("token_embedding.weight", "head.weight")


def to_huggingface(model: Transformer) -> Any:
    """The same model as a `GPT2LMHeadModel`, or as a `ForCausalLM` of Llama, Qwen3, Arcee or Apertus.

    It is on the CPU, in the same dtype, for evaluation. Its vocabulary has no padding rows. Biases that a GPT-2 must
    have and this model has not become zeros. Raises `UserError` naming every option of the
    configuration that the counterpart lacks.
    """
    import transformers

    config = model.config
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for name in _VOCABULARY_TABLES:
        if name in weights:
            weights[name] = weights[name][: config.vocab_size]
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    theirs: Any
    if config.position == "learned":
        gpt2 = {"norm": "layernorm", "activation": "gelu", "qk_norm": False, "n_kv_heads": config.n_heads}
        _require("GPT-2", config, **gpt2, **_NEUTRAL)
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=config.context_length,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_inner=config.feed_forward_dim,
                layer_norm_epsilon=config.norm_eps,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                **shared,
            )
        )
        state = _to_gpt2(weights, config)
    else:
        kin = _kin_of(config)
        theirs = getattr(transformers, f"{kin.name}ForCausalLM")(_kin_config(kin, config, shared))
        state = {there: weights[here] for here, there in _kin_names(kin, config).items()}
        scale = torch.ones(config.head_dim, dtype=model.output_weight.dtype)
        state |= {f"{name}.weight": scale.clone() for name in _scales(kin, config)}
    theirs = theirs.to(model.output_weight.dtype)
    if config.tie_embeddings:
        state["lm_head.weight"] = weights["token_embedding.weight"]
    theirs.load_state_dict(state)
    return theirs.eval()


def from_huggingface(hf_model: Any) -> Transformer:
    """The same model as a `Transformer`, on the CPU, in the same dtype, for evaluation.

    `hf_model` is of one of the classes that `to_huggingface` gives. Raises `UserError` for another architecture, or
    naming the option that a `Transformer` lacks.
    """
    name = type(hf_model).__name__
    theirs = {key: value.detach().cpu() for key, value in hf_model.state_dict().items()}
    kin = next((kin for kin in _KIN if name == f"{kin.name}ForCausalLM"), None)
    if kin is not None:
        config = _config_of_kin(kin, hf_model.config)
        for scale in _scales(kin, config):
            if not (theirs[f"{scale}.weight"] == 1).all():
                raise UserError(f"The {kin.name} model has a learned {scale}, which has no counterpart here.")
        state = {here: theirs[there] for here, there in _kin_names(kin, config).items()}
    elif name == "GPT2LMHeadModel":
        config = _config_of_gpt2(hf_model.config)
        state = _from_gpt2(theirs, config)
    else:
        known = ", ".join(["GPT2LMHeadModel", *(f"{kin.name}ForCausalLM" for kin in _KIN)])
        raise UserError(f"A {name} cannot be imported; these can: {known}.")
    for table in _VOCABULARY_TABLES:
        if table in state:
            state[table] = F.pad(state[table], (0, 0, 0, config.padded_vocab_size - hf_model.config.vocab_size))
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(hf_model.dtype).to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval()


def _require(counterpart: str, config: ModelConfig, **needed: Any) -> None:
    """Raise `UserError` unless every option in `needed` has the value that the counterpart knows."""
    values = {**config.model_dump(), "n_kv_heads": config.kv_heads}
    wrong = [key for key, value in needed.items() if values[key] != value]
    if wrong:
        there = ", ".join(f"model.{key}={_yaml(values[key])}" for key in wrong)
        instead = " ".join(f"model.{key}={_yaml(needed[key])}" for key in wrong)
        raise UserError(
            f"Hugging Face's {counterpart}, the counterpart of model.position={config.position}, has no {there}. "
            f"Only a model trained with {instead} can be exported to it."
        )


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _kin_of(config: ModelConfig) -> _Kin:
    """The architecture with the equations of `config`; `UserError` naming what none of them has."""
    kin = next((kin for kin in _KIN if (kin.activation, kin.qk_norm) == (config.activation, config.qk_norm)), _LLAMA)
    needed: dict[str, Any] = {"norm": "rmsnorm", "activation": kin.activation, "qk_norm": kin.qk_norm, **_NEUTRAL}
    if "mlp_bias" not in kin.options:
        needed["bias"] = False
    _require(kin.name, config, **needed)
    return kin


def _kin_config(kin: _Kin, config: ModelConfig, shared: dict[str, Any]) -> Any:
    import transformers

    own = {"head_dim": config.head_dim, "mlp_bias": config.bias}
    return getattr(transformers, f"{kin.name}Config")(
        max_position_embeddings=config.context_length,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.feed_forward_dim,
        hidden_act=_ACTIVATIONS[kin.activation],
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=config.bias,
        attention_dropout=config.dropout,
        **{key: value for key, value in own.items() if key in kin.options},
        **shared,
    )


def _scales(kin: _Kin, config: ModelConfig) -> list[str]:
    """Names of the normalisations of queries and keys, whose scale is 1 here."""
    return [f"model.layers.{n}.{norm}" for n in range(config.n_layers) for norm in _QK_NORMS if kin.qk_norm]


def _kin_names(kin: _Kin, config: ModelConfig) -> dict[str, str]:
    """Name of every weight here, and its name there."""
    names = {"token_embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    for layer in range(config.n_layers):
        for here, there in kin.block.items():
            kinds = ("weight", "bias") if config.bias and not here.endswith("norm") else ("weight",)
            for kind in kinds:
                names[f"blocks.{layer}.{here}.{kind}"] = f"model.layers.{layer}.{there}.{kind}"
    return names


def _gpt2_names(config: ModelConfig) -> dict[str, str]:
    """Name of every layer here, and its name in `GPT2LMHeadModel`, but for the fused query, key and value."""
    names = {"final_norm": "transformer.ln_f"}
    for layer in range(config.n_layers):
        for here, there in _GPT2_BLOCK.items():
            names[f"blocks.{layer}.{here}"] = f"transformer.h.{layer}.{there}"
    return names


def _to_gpt2(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT-2's weights: matrices are stored `(in, out)`; query, key and value are one matrix."""
    state = {"transformer.wte.weight": weights["token_embedding.weight"]}
    state["transformer.wpe.weight"] = weights["position_embedding.weight"]
    if not config.tie_embeddings:
        state["lm_head.weight"] = weights["head.weight"]

    def put(there: str, weight: Tensor, bias: Tensor | None) -> None:
        state[f"{there}.weight"] = weight.T if weight.ndim == 2 else weight
        state[f"{there}.bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias

    for here, there in _gpt2_names(config).items():
        put(there, weights[f"{here}.weight"], weights.get(f"{here}.bias"))
    for layer in range(config.n_layers):
        parts = [f"blocks.{layer}.attention.{part}" for part in _QKV]
        weight = torch.cat([weights[f"{part}.weight"] for part in parts])
        bias = torch.cat([weights[f"{part}.bias"] for part in parts]) if config.bias else None
        put(f"transformer.h.{layer}.attn.c_attn", weight, bias)
    return state


def _from_gpt2(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The reverse of `_to_gpt2`."""
    state = {"token_embedding.weight": theirs["transformer.wte.weight"]}
    state["position_embedding.weight"] = theirs["transformer.wpe.weight"]
    if not config.tie_embeddings:
        state["head.weight"] = theirs["lm_head.weight"]
    for here, there in _gpt2_names(config).items():
        weight = theirs[f"{there}.weight"]
        state[f"{here}.weight"] = weight.T if weight.ndim == 2 else weight
        state[f"{here}.bias"] = theirs[f"{there}.bias"]
    for layer in range(config.n_layers):
        fused = f"transformer.h.{layer}.attn.c_attn"
        for kind in ("weight", "bias"):
            thirds = [third.T if third.ndim == 2 else third for third in theirs[f"{fused}.{kind}"].chunk(3, dim=-1)]
            state |= {f"blocks.{layer}.attention.{part}.{kind}": third for part, third in zip(_QKV, thirds)}
    return state


def _refuse(hf_config: Any, **allowed: tuple[Any, ...]) -> None:
    """Raise `UserError` for the first option of `hf_config` that is not among the `allowed` values."""
    for key, values in allowed.items():
        if getattr(hf_config, key) not in values:
            raise UserError(
                f"The {hf_config.model_type} model has {key}={getattr(hf_config, key)}, which has no counterpart here; "
                f"only {' or '.join(map(str, values))} can be imported."
            )


def _config_of_gpt2(theirs: Any) -> ModelConfig:
    _refuse(
        theirs,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return ModelConfig(
        variant="gpt2",
        context_length=theirs.n_positions,
        vocab_size=theirs.vocab_size,
        n_layers=theirs.n_layer,
        n_heads=theirs.n_head,
        n_kv_heads=None,
        d_model=theirs.n_embd,
        d_ff=theirs.n_inner,
        position="learned",
        rope_theta=10000.0,
        norm="layernorm",
        norm_eps=theirs.layer_norm_epsilon,
        activation="gelu",
        bias=True,
        tie_embeddings=theirs.tie_word_embeddings,
        qk_norm=False,
        dropout=theirs.resid_pdrop,
        init_std=theirs.initializer_range,
        zero_init_projections=False,
        **BEFORE["model"],
    )


def _config_of_kin(kin: _Kin, theirs: Any) -> ModelConfig:
    activations = {"swiglu": ("silu", "swish"), "squared_relu": ("relu2",)}[kin.activation]
    width = theirs.hidden_size // theirs.num_attention_heads
    own = {"head_dim": (width,), "mlp_bias": (theirs.attention_bias,)}
    _refuse(theirs, hidden_act=activations, **{key: own[key] for key in kin.options})
    if "mlp_bias" not in kin.options:
        _refuse(theirs, attention_bias=(False,))
    if getattr(theirs, "use_sliding_window", False):
        _refuse(theirs, use_sliding_window=(False,))
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"The {theirs.model_type} model has rope_type={rope['rope_type']}, which has no counterpart here."
        )
    return ModelConfig(
        variant=theirs.model_type,
        context_length=theirs.max_position_embeddings,
        vocab_size=theirs.vocab_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_model=theirs.hidden_size,
        d_ff=theirs.intermediate_size,
        position="rope",
        rope_theta=rope["rope_theta"],
        norm="rmsnorm",
        norm_eps=theirs.rms_norm_eps,
        activation=kin.activation,
        bias=theirs.attention_bias,
        tie_embeddings=theirs.tie_word_embeddings,
        qk_norm=kin.qk_norm,
        dropout=0.0,
        init_std=theirs.initializer_range,
        zero_init_projections=False,
        **BEFORE["model"],
    )
