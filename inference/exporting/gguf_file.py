"""A checkpoint as a GGUF file, which llama.cpp and the programs around it read.

Names and layout are those of llama.cpp's own converter: GPT-2's matrices turned round, the rows of Llama's queries and
keys reordered for rotary positions that take neighbours as pairs, vectors always in float32, scaled rotary positions as
what divides each frequency.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from config.errors import UserError
from config.files import atomic_write
from inference.exporting.gguf_vocabulary import add_vocabulary
from inference.exporting.subject import Subject, check_free, check_room, save_tokenizer
from model.positions import rotary_frequencies

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


class _Kind(NamedTuple):
    architecture: gguf.MODEL_ARCH
    reordered: bool
    """Whether the rows of queries and keys are reordered."""
    ties: bool = True
    """Whether the output matrix is left out where it is the embedding."""


_KINDS = {
    "GPT2LMHeadModel": _Kind(gguf.MODEL_ARCH.GPT2, False),
    "LlamaForCausalLM": _Kind(gguf.MODEL_ARCH.LLAMA, True),
    "Qwen3ForCausalLM": _Kind(gguf.MODEL_ARCH.QWEN3, False),
    "ArceeForCausalLM": _Kind(gguf.MODEL_ARCH.ARCEE, True),
    "ApertusForCausalLM": _Kind(gguf.MODEL_ARCH.APERTUS, False, ties=False),
}
_ROPE_FREQS = "rope_freqs.weight"
_SQUARED_RELU = (-1000.0, math.log(math.expm1(1.0)), 0.0, -1e-6)
"""alpha_n, alpha_p, beta and eps of the xIELU (Huang and Schlag, 2024) that is a squared ReLU.

Their softplus, 0 and 1 in float32, are the weights of its negative and of its squared part; beta is that of the linear.
"""
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_FLOAT32 = ("position_embd.weight",)  # llama.cpp adds its rows to others of that type


def check_file(target: Path, force: bool) -> None:
    """Raise `UserError` where `target` must not become the file: it exists, and without `force` or as no GGUF file."""
    ours = not target.exists() or (target.is_file() and _beginning(target) == b"GGUF")
    if not ours:
        raise UserError(f"{target} exists and is no GGUF file. Choose another place.")
    check_free(target, force)


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def write_gguf(subject: Subject, path: Path, dtype: str) -> None:
    """Write `subject` to the file `path`, its matrices in `dtype`: f32, f16, bf16 or q8_0 (8.5 bits a weight).

    Raises `UserError` where llama.cpp has no such architecture or tokenizer, or the disk no room.
    """
    kind = _kind_of(subject)
    block, size = gguf.GGML_QUANT_SIZES[_TYPES[dtype][0]]
    again = subject.theirs.lm_head.weight.numel() if subject.config.tie_embeddings and not kind.ties else 0
    check_room(path.absolute().parent, (subject.parameters + again) * size // block)
    with tempfile.TemporaryDirectory() as aside:
        description = save_tokenizer(subject.tokenizer, Path(aside))
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, gguf.MODEL_ARCH_NAMES[kind.architecture])
        _add_settings(writer, subject)
        writer.add_file_type(_TYPES[dtype][1])
        add_vocabulary(writer, subject, description)
        for name, values in _tensors(subject, kind):
            _add_tensor(writer, name, values, _TYPES[dtype][0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _kind_of(subject: Subject) -> _Kind:
    if subject.config.bias and subject.architecture == "ArceeForCausalLM":
        raise UserError(
            "llama.cpp's Arcee, the counterpart of model.activation=squared_relu, has no model.bias=true. Only a model "
            "trained with model.bias=false can be exported to gguf."
        )
    if subject.config.rope_scaling is not None and subject.architecture == "Qwen3ForCausalLM":
        raise UserError(
            "llama.cpp's Qwen3, the counterpart of model.qk_norm=true with model.activation=swiglu, has no "
            "model.rope_scaling. Only a model trained with model.rope_scaling=null can be exported to gguf."
        )
    return _KINDS[subject.architecture]


def _add_settings(writer: gguf.GGUFWriter, subject: Subject) -> None:
    config = subject.config
    writer.add_name(subject.name)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.feed_forward_dim)
    writer.add_head_count(config.n_heads)
    writer.add_vocab_size(subject.theirs.config.vocab_size)
    if config.position == "learned":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if subject.architecture == "ApertusForCausalLM":
        alpha_n, alpha_p, beta, eps = ([value] * config.n_layers for value in _SQUARED_RELU)
        writer.add_xielu_alpha_n(alpha_n)
        writer.add_xielu_alpha_p(alpha_p)
        writer.add_xielu_beta(beta)
        writer.add_xielu_eps(eps)


def _tensors(subject: Subject, kind: _Kind) -> Iterator[tuple[str, Tensor]]:
    """Names and values as llama.cpp's converter gives them."""
    config = subject.config
    names = gguf.get_tensor_name_map(kind.architecture, config.n_layers)
    for name, values in subject.theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings and kind.ties:
            continue
        if name.endswith(_TRANSPOSED):
            values = values.T
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.kv_heads)):
            if kind.reordered and f".{part}." in name:
                values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        yield there, values
    if config.position == "rope" and config.rope_scaling is not None:
        shape = (config.head_dim, config.rope_theta)
        yield _ROPE_FREQS, rotary_frequencies(*shape, None) / rotary_frequencies(*shape, config.rope_scaling)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, wanted: gguf.GGMLQuantizationType) -> None:
    """Rows that do not divide into blocks of q8_0 are f16, as in llama.cpp's converter."""
    values: NDArray[np.float32] = tensor.float().contiguous().numpy()
    if values.ndim == 1 or name in _FLOAT32:
        wanted = gguf.GGMLQuantizationType.F32
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        wanted = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
