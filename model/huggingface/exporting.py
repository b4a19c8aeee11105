"""A `Transformer` as a model of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from config.earlier import BEFORE
from config.errors import UserError
from config.model import ModelConfig
from model.huggingface.names import KIN, LLAMA, QKV, VOCABULARY_TABLES, Kin, gpt2_names, kin_names, scales
from model.transformer import Transformer

_ACTIVATIONS = {"swiglu": "silu", "squared_relu": "relu2"}
_NEUTRAL = {key: value for key, value in BEFORE["model"].items() if key not in ("d_head", "window_pattern")}


def to_huggingface(model: Transformer) -> Any:
    """The same model as a `GPT2LMHeadModel`, or as a `ForCausalLM` of Llama, Qwen3, Arcee or Apertus.

    It is on the CPU, in the same dtype, for evaluation. Its vocabulary has no padding rows. Biases that a GPT-2 must
    have and this model has not become zeros. Raises `UserError` naming every option of the
    configuration that the counterpart lacks.
    """
    import transformers

    config = model.config
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for name in VOCABULARY_TABLES:
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
        _check_heads("GPT-2", config)
        _require("GPT-2", config, **gpt2, **_usual_heads(config), **_NEUTRAL)
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
        state = {there: weights[here] for here, there in kin_names(kin, config).items()}
        scale = torch.ones(config.head_dim, dtype=model.output_weight.dtype)
        state = {name: scale.clone() for name in scales(kin, config)} | state
    theirs = theirs.to(model.output_weight.dtype)
    if config.tie_embeddings:
        state["lm_head.weight"] = weights["token_embedding.weight"]
    theirs.load_state_dict(state)
    return theirs.eval()


def _require(counterpart: str, config: ModelConfig, **needed: Any) -> None:
    """Raise `UserError` unless every option in `needed` has the value that the counterpart knows."""
    values = {**config.model_dump(), "n_kv_heads": config.kv_heads, "d_head": config.head_dim}
    wrong = [key for key, value in needed.items() if values[key] != value]
    if wrong:
        there = ", ".join(f"model.{key}={_yaml(values[key])}" for key in wrong)
        instead = " ".join(f"model.{key}={_yaml(needed[key])}" for key in wrong)
        raise UserError(
            f"Hugging Face's {counterpart}, the counterpart of model.position={config.position}, has no {there}. "
            f"Only a model trained with {instead} can be exported to it."
        )


def _check_heads(counterpart: str, config: ModelConfig) -> None:
    if config.d_model % config.n_heads:
        raise UserError(
            f"Hugging Face's {counterpart} wants a multiple of model.n_heads={config.n_heads} for model.d_model, which "
            f"is {config.d_model}, whatever model.d_head is. Only a model trained with one can be exported to it."
        )


def _usual_heads(config: ModelConfig) -> dict[str, int]:
    """The width of heads where there is no choice."""
    return {"d_head": config.d_model // config.n_heads}


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _kin_of(config: ModelConfig) -> Kin:
    """The architecture with the equations of `config`; `UserError` naming what none of them has."""
    kin = next(
        (kin for kin in KIN if (kin.activation, kin.qk_norm) == (config.activation, bool(config.qk_norm))), LLAMA
    )
    needed: dict[str, Any] = {"norm": "rmsnorm", "activation": kin.activation, **_NEUTRAL}
    if not kin.qk_norm:
        needed["qk_norm"] = False
    del needed["rope_scaling"]
    if "mlp_bias" not in kin.options:
        needed["bias"] = False
    if kin.name != "Qwen3":
        _check_heads(kin.name, config)
    if "head_dim" not in kin.options:
        needed |= _usual_heads(config)
    _require(kin.name, config, **needed)
    return kin


def _kin_config(kin: Kin, config: ModelConfig, shared: dict[str, Any]) -> Any:
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
        rope_parameters=_rope_parameters(config),
        attention_bias=config.bias,
        attention_dropout=config.dropout,
        **{key: value for key, value in own.items() if key in kin.options},
        **shared,
    )


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = scaling.model_dump(exclude={"original_context_length"})
    original = {"original_max_position_embeddings": scaling.original_context_length}
    return {"rope_type": "llama3", "rope_theta": config.rope_theta, **theirs, **original}


def _to_gpt2(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT-2's weights: matrices are stored `(in, out)`; query, key and value are one matrix."""
    state = {"transformer.wte.weight": weights["token_embedding.weight"]}
    state["transformer.wpe.weight"] = weights["position_embedding.weight"]
    if not config.tie_embeddings:
        state["lm_head.weight"] = weights["head.weight"]

    def put(there: str, weight: Tensor, bias: Tensor | None) -> None:
        state[f"{there}.weight"] = weight.T if weight.ndim == 2 else weight
        state[f"{there}.bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias

    for here, there in gpt2_names(config).items():
        put(there, weights[f"{here}.weight"], weights.get(f"{here}.bias"))
    for layer in range(config.n_layers):
        parts = [f"blocks.{layer}.attention.{part}" for part in QKV]
        weight = torch.cat([weights[f"{part}.weight"] for part in parts])
        bias = torch.cat([weights[f"{part}.bias"] for part in parts]) if config.bias else None
        put(f"transformer.h.{layer}.attn.c_attn", weight, bias)
    return state
