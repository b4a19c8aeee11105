"""Weights to and from `transformers`: the same logits on both sides, in both directions, bit for bit around."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from config.errors import UserError
from config.load import load_config
from config.model import ModelConfig
from model.huggingface.exporting import to_huggingface
from model.huggingface.importing import from_huggingface
from model.transformer import Transformer

VOCABULARY = 300
GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": "true", "qk_norm": "false"}
LLAMA = {"activation": "swiglu", "qk_norm": "false"}
EXPORTED: dict[str, dict[str, Any]] = {
    "gpt2 tied": {**GPT2, "tie_embeddings": "true"},
    "gpt2 untied": {**GPT2, "d_ff": 96, "norm_eps": 1e-3},
    "gpt2 without biases": {**GPT2, "bias": "false", "tie_embeddings": "true"},
    "llama": LLAMA,
    "llama tied, grouped": {**LLAMA, "tie_embeddings": "true", "n_kv_heads": 2, "d_ff": 80},
    "llama one key head, biases, theta": {**LLAMA, "n_kv_heads": 1, "bias": "true", "rope_theta": 500.0},
    "llama with wide heads": {**LLAMA, "n_kv_heads": 2, "d_head": 24, "bias": "true"},
    "qwen3 with narrow heads": {**LLAMA, "qk_norm": "learned", "n_heads": 3, "d_head": 10},
    "qwen3": {**LLAMA, "qk_norm": "true", "tie_embeddings": "true", "n_kv_heads": 2},
    "qwen3 with learned scales": {**LLAMA, "qk_norm": "learned", "n_kv_heads": 2},
    "arcee with biases": {"qk_norm": "false", "bias": "true"},
    "apertus, the default": {"rope_theta": 500.0},
    "apertus with learned scales": {"qk_norm": "learned"},
    "apertus tied, grouped": {"tie_embeddings": "true", "n_kv_heads": 2},
}
CLASSES = {"gpt2": "GPT2LMHead", "llama": "Llama", "qwen3": "Qwen3", "arcee": "Arcee", "apertus": "Apertus"}


def config_of(**options: Any) -> ModelConfig:
    shape = {"vocab_size": VOCABULARY, "n_layers": 3, "d_model": 64, "n_heads": 4, "context_length": 48}
    chosen = {**shape, "init_std": 0.1, "zero_init_projections": "false", **options}
    return load_config([], [f"model.{key}={value}" for key, value in chosen.items()]).model


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))


def randomised(model: Any) -> Any:
    """Give every weight, biases and scales too, a value that no other has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", EXPORTED)
def test_export_has_the_same_logits_and_comes_back_unchanged(kind: str) -> None:
    model = randomised(Transformer(config_of(**EXPORTED[kind])))
    theirs = to_huggingface(model)
    expected = next(name for key, name in CLASSES.items() if kind.startswith(key))
    assert type(theirs).__name__ in (f"{expected}Model", f"{expected}ForCausalLM")
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.config.vocab_size == VOCABULARY
    with torch.no_grad():
        ours, logits = model(tokens()), theirs(tokens()).logits
    assert logits.shape == ours.shape and ours.std() > 0.3
    assert (logits - ours).abs().max() < 1e-4
    back = from_huggingface(theirs)
    assert back.config.tie_embeddings == model.config.tie_embeddings
    for name, weight in model.state_dict().items():
        rows = slice(VOCABULARY) if name in ("token_embedding.weight", "head.weight") else slice(None)
        assert torch.equal(back.state_dict()[name][rows], weight[rows]), name


def test_export_survives_being_saved_and_loaded(tmp_path: Any) -> None:
    import transformers

    model = Transformer(config_of(**LLAMA, n_kv_heads=2)).eval()
    to_huggingface(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (loaded(tokens()).logits - model(tokens())).abs().max() < 1e-4


def test_export_keeps_the_dtype() -> None:
    theirs = to_huggingface(Transformer(config_of(**LLAMA)).to(torch.bfloat16))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    assert from_huggingface(theirs).output_weight.dtype == torch.bfloat16


def their_gpt2(**options: Any) -> Any:
    import transformers

    shape = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 64, "n_layer": 3, "n_head": 4}
    nothing = {"bos_token_id": None, "eos_token_id": None}
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **nothing, **options})))


def their_llama(**options: Any) -> Any:
    import transformers

    shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 48, "hidden_size": 64, "intermediate_size": 176}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    nothing = {"bos_token_id": None, "eos_token_id": None}
    return randomised(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **heads, **nothing, **options}))
    )


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: their_gpt2(),
        lambda: their_gpt2(tie_word_embeddings=False, n_inner=100),
        lambda: their_llama(),
        lambda: their_llama(head_dim=32),
        lambda: their_llama(tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-3),
        lambda: their_llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    ],
    ids=["gpt2", "gpt2 untied", "llama", "llama with wide heads", "llama tied", "llama with biases"],
)
def test_import_has_the_same_logits(theirs: Any) -> None:
    hf_model = theirs()
    model = from_huggingface(hf_model)
    with torch.no_grad():
        ours, logits = model(tokens()), hf_model(tokens()).logits
    assert ours.std() > 0.3
    assert (ours - logits).abs().max() < 1e-4
    assert model.num_parameters() == hf_model.num_parameters()
    assert not model.output_weight[VOCABULARY:].any()
    again = to_huggingface(model).state_dict()
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(again[name], weight), name


def test_gpt2_weights_map_one_to_one() -> None:
    hf_model = their_gpt2()
    model = from_huggingface(hf_model)
    block = hf_model.transformer.h[1]
    query, key, value = block.attn.c_attn.weight.split(64, dim=1)
    expected = {
        "attention.query": query,
        "attention.key": key,
        "attention.value": value,
        "attention.output": block.attn.c_proj.weight,
        "feed_forward.up": block.mlp.c_fc.weight,
        "feed_forward.down": block.mlp.c_proj.weight,
    }
    for name, weight in expected.items():
        assert torch.equal(model.blocks[1].get_parameter(f"{name}.weight"), weight.T), name
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, hf_model))
    assert ours == theirs + 64 * (model.config.padded_vocab_size - VOCABULARY)


@pytest.mark.parametrize(
    "options, there, instead",
    [
        (
            {"activation": "gelu"},
            "Llama.*no model.activation=gelu, model.qk_norm=true",
            "model.activation=swiglu model.qk_norm=false",
        ),
        ({"bias": "true"}, "Apertus.*no model.bias=true", "model.bias=false"),
        ({"logit_soft_cap": 30.0}, "Apertus.*no model.logit_soft_cap=30.0", "model.logit_soft_cap=null"),
        ({**LLAMA, "logit_soft_cap": 30.0}, "Llama.*no model.logit_soft_cap=30.0", "model.logit_soft_cap=null"),
        ({**GPT2, "logit_soft_cap": 30.0}, "GPT-2.*no model.logit_soft_cap=30.0", "model.logit_soft_cap=null"),
        ({**LLAMA, "window": 16}, "Llama.*no model.window=16", "model.window=null"),
        (
            {**LLAMA, "value_embeddings": "all", "residual_scaling": "true"},
            "Llama.*no model.value_embeddings=all, model.residual_scaling=true",
            "model.value_embeddings=none model.residual_scaling=false",
        ),
        ({**LLAMA, "norm": "layernorm"}, "Llama.*no model.norm=layernorm", "model.norm=rmsnorm"),
        ({**GPT2, "n_kv_heads": 2}, "GPT-2.*no model.n_kv_heads=2", "model.n_kv_heads=4"),
        ({**GPT2, "activation": "swiglu"}, "GPT-2.*no model.activation=swiglu", "model.activation=gelu"),
        ({**GPT2, "norm": "rmsnorm"}, "GPT-2.*no model.norm=rmsnorm", "model.norm=layernorm"),
        ({**GPT2, "d_head": 32}, "GPT-2.*no model.d_head=32", "model.d_head=16"),
        ({"d_head": 32}, "Apertus.*no model.d_head=32", "model.d_head=16"),
        ({**GPT2, "qk_norm": "true"}, "GPT-2.*no model.qk_norm=true", "model.qk_norm=false"),
    ],
)
def test_option_without_counterpart_is_named(options: dict[str, Any], there: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"{there}. Only a model trained with {instead} can be exported"):
        to_huggingface(Transformer(config_of(**options)))


@pytest.mark.parametrize("kind", [GPT2, LLAMA, {"qk_norm": "false"}, {}], ids=["gpt2", "llama", "arcee", "apertus"])
def test_heads_that_must_divide_the_width_are_named(kind: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="multiple of model.n_heads=4 for model.d_model, which is 50"):
        to_huggingface(Transformer(config_of(**{**kind, "d_model": 50, "d_head": 12})))


@pytest.mark.parametrize(
    "theirs, message",
    [
        (lambda: their_gpt2(activation_function="relu"), "activation_function=relu"),
        (lambda: their_gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (lambda: their_llama(hidden_act="gelu"), "hidden_act=gelu"),
        (lambda: their_llama(attention_bias=True), "mlp_bias=False"),
        (lambda: their_llama(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_type=linear"),
        (lambda: their_gpt2().transformer, "A GPT2Model cannot be imported"),
    ],
)
def test_what_cannot_be_imported_is_named(theirs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_huggingface(theirs())


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_scales_of_queries_and_keys_come_in_where_they_are_learned(scale: float) -> None:
    hf_model = to_huggingface(Transformer(config_of()))
    with torch.no_grad():
        hf_model.model.layers[1].self_attn.k_norm.weight[3] = scale
    model = from_huggingface(hf_model)
    assert model.config.qk_norm == (True if scale == 1.0 else "learned")
    with torch.no_grad():
        assert (model(tokens()) - hf_model(tokens()).logits).abs().max() < 1e-4
    assert to_huggingface(model).model.layers[1].self_attn.k_norm.weight[3] == scale


def test_transformers_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, model.huggingface.exporting, model.huggingface.importing; sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
