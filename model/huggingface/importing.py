"""A model of `transformers` as a `Transformer`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config.earlier import BEFORE
from config.errors import UserError
from config.model import ModelConfig, RopeScaling
from model.huggingface.names import CLASSES, KIN, QKV, VOCABULARY_TABLES, Kin, gpt2_names, kin_names, scales
from model.transformer import Transformer


def from_huggingface(hf_model: Any, context_length: int | None = None) -> Transformer:
    """The same model as a `Transformer`, on the CPU, in the same dtype, for evaluation.

    `hf_model` is of one of the classes that `to_huggingface` gives; with a `context_length`, no more tokens are seen at
    once than that. Raises `UserError` for another architecture, a context longer than the model's, or naming the option
    that a `Transformer` lacks.
    """
    name = type(hf_model).__name__
    theirs = {key: value.detach().cpu() for key, value in hf_model.state_dict().items()}
    kin = next((kin for kin in KIN if name == f"{kin.name}ForCausalLM"), None)
    if kin is not None:
        config = _config_of_kin(kin, hf_model.config, context_length)
        if not all((theirs[scale] == 1).all() for scale in scales(kin, config)):
            config = config.model_copy(update={"qk_norm": "learned"})
        state = {here: theirs[there] for here, there in kin_names(kin, config).items()}
    elif name == "GPT2LMHeadModel":
        config = _config_of_gpt2(hf_model.config, context_length)
        state = _from_gpt2(theirs, config)
    else:
        raise UserError(f"A {name} cannot be imported; these can: {', '.join(CLASSES)}.")
    for table in VOCABULARY_TABLES:
        if table in state:
            state[table] = F.pad(state[table], (0, 0, 0, config.padded_vocab_size - hf_model.config.vocab_size))
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(hf_model.dtype).to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval()


def _from_gpt2(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights of GPT-2's: matrices are stored `(in, out)` there; query, key and value are one matrix."""
    state = {"token_embedding.weight": theirs["transformer.wte.weight"]}
    state["position_embedding.weight"] = theirs["transformer.wpe.weight"][: config.context_length]
    if not config.tie_embeddings:
        state["head.weight"] = theirs["lm_head.weight"]
    for here, there in gpt2_names(config).items():
        weight = theirs[f"{there}.weight"]
        state[f"{here}.weight"] = weight.T if weight.ndim == 2 else weight
        state[f"{here}.bias"] = theirs[f"{there}.bias"]
    for layer in range(config.n_layers):
        fused = f"transformer.h.{layer}.attn.c_attn"
        for kind in ("weight", "bias"):
            thirds = [third.T if third.ndim == 2 else third for third in theirs[f"{fused}.{kind}"].chunk(3, dim=-1)]
            state |= {f"blocks.{layer}.attention.{part}.{kind}": third for part, third in zip(QKV, thirds)}
    return state


def _refuse(hf_config: Any, **allowed: tuple[Any, ...]) -> None:
    """Raise `UserError` for the first option of `hf_config` that is not among the `allowed` values."""
    for key, values in allowed.items():
        if getattr(hf_config, key) not in values:
            raise UserError(
                f"The {hf_config.model_type} model has {key}={getattr(hf_config, key)}, which has no counterpart here; "
                f"only {' or '.join(map(str, values))} can be imported."
            )


def _context(theirs: Any, wanted: int | None) -> int:
    longest = int(theirs.max_position_embeddings)
    if wanted is not None and wanted > longest:
        raise UserError(f"--context-length {wanted} is more than the model's {longest:,}.")
    return wanted or longest


def _config_of_gpt2(theirs: Any, wanted: int | None) -> ModelConfig:
    _refuse(
        theirs,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return ModelConfig(
        variant="gpt2",
        context_length=_context(theirs, wanted),
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


def _config_of_kin(kin: Kin, theirs: Any, wanted: int | None) -> ModelConfig:
    context_length = _context(theirs, wanted)
    activations = {"swiglu": ("silu", "swish"), "squared_relu": ("relu2",)}[kin.activation]
    bias = getattr(theirs, "attention_bias", False)
    _refuse(theirs, hidden_act=activations)
    if "mlp_bias" in kin.options:
        _refuse(theirs, mlp_bias=(bias,))
    elif bias:
        _refuse(theirs, attention_bias=(False,))
    if getattr(theirs, "use_sliding_window", False):
        _refuse(theirs, use_sliding_window=(False,))
    if kin.name == "Mistral" and (theirs.sliding_window or math.inf) < context_length:
        raise UserError(
            f"The {theirs.model_type} model sees {theirs.sliding_window:,} tokens in all its layers, fewer than its "
            f"context, which has no counterpart here. Add --context-length {theirs.sliding_window}."
        )
    return ModelConfig(
        variant=theirs.model_type,
        context_length=context_length,
        vocab_size=theirs.vocab_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_model=theirs.hidden_size,
        d_ff=theirs.intermediate_size,
        position="rope",
        rope_theta=theirs.rope_parameters["rope_theta"],
        norm="rmsnorm",
        norm_eps=theirs.rms_norm_eps,
        activation=kin.activation,
        bias=bias,
        tie_embeddings=theirs.tie_word_embeddings,
        qk_norm=kin.qk_norm,
        dropout=0.0,
        init_std=theirs.initializer_range,
        zero_init_projections=False,
        **(BEFORE["model"] | {"d_head": _head_width(theirs), "rope_scaling": _rope_scaling(theirs)}),
    )


def _head_width(theirs: Any) -> int | None:
    """The width of a head, unless it is what it is where nothing is said."""
    width: int = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    return None if width == theirs.hidden_size / theirs.num_attention_heads else width


def _rope_scaling(theirs: Any) -> RopeScaling | None:
    rope = theirs.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0:
        return None
    if kind != "llama3":
        raise UserError(f"The {theirs.model_type} model has rope_type={kind}, which has no counterpart here.")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context_length=rope["original_max_position_embeddings"],
    )
