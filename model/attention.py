"""Causal self-attention with any number of key/value heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from config.model import ModelConfig
from model.cache import KVCache
from model.masks import Mask, Masks, Pieces
from model.norms import HeadNorm, rms_norm
from model.positions import Rotation, rotate
from model.sharding import random_numbers_of_slice

# Up to this many tokens plain products beat the CPU's flash kernel in bfloat16; from 1024 on it is the other way round.
SHORT = 512
GATE_CHANNELS = 12  # of a layer's input, which open the gate of its value embedding


class Shared(NamedTuple):
    """What all layers of one forward pass over `(batch, T)` tokens have in common.

    With a cache, new keys and values go to `positions` `(batch, T)` of it, and `of_cache` says whether the masks are
    about all that it holds or about the new tokens alone. `masks` are those of every window, as in `model.masks`.
    """

    embedding: Tensor
    """`(batch, T, d_model)`: what the first layer was given."""
    rotation: Rotation | None
    cache: KVCache | None
    positions: Tensor | None
    masks: Masks
    of_cache: bool


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), grouped-query where `n_kv_heads` is smaller (Ainslie et al., 2023).

    With `qk_norm`, queries and keys are divided by their root mean square per head (Henry et al., 2020), and "learned"
    scaled by a vector for all heads (Qwen3, 2025). In layers with a value embedding (Zhou et al., 2024, as simplified
    in modded-nanogpt), a vector that depends on the token alone is added to the values, times a gate in (0, 2) per head
    that opens by the first channels of the input (nanochat, 2026) and starts at 1.

    Where several processes share the heads, `slice` is the number of those that are here.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.layer_windows[layer]
        self.head_dim = config.head_dim
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        self.dropout = config.dropout
        self.slice: int | None = None
        width, kv_width = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, width, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.output = nn.Linear(width, config.d_model, bias=config.bias)
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if config.qk_norm == "learned":
            self.query_norm, self.key_norm = (HeadNorm(config.head_dim, config.norm_eps) for _ in range(2))
        self.value_gate: nn.Linear | None = None
        if layer in config.value_embedding_layers:
            self.value_gate = nn.Linear(min(GATE_CHANNELS, config.d_model), config.kv_heads, bias=False)

    def forward(self, x: Tensor, shared: Shared, value_embedding: Tensor | None = None) -> Tensor:
        """Mix `x` `(batch, T, d_model)` over time.

        `value_embedding` `(batch, T, kv_heads * head_dim)` is added to the values, through the gate of each head.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if self.value_gate is not None and value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
            value = torch.addcmul(value, gate.unsqueeze(-1), value_embedding.to(value.dtype).view(heads))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        elif self.qk_norm:
            query = rms_norm(query, None, self.norm_eps)
            key = rms_norm(key, None, self.norm_eps)
        if shared.rotation is not None:
            query, key = rotate(query, shared.rotation), rotate(key, shared.rotation)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if shared.cache is not None and shared.positions is not None:
            new = key.transpose(1, 2), value.transpose(1, 2)
            seen_keys, seen_values = shared.cache.update(self.layer, *new, shared.positions)
            if shared.of_cache:
                query, key, value = query.to(seen_keys.dtype), seen_keys, seen_values
        mask, dropout = shared.masks[self.window], self.dropout if self.training else 0.0
        if self.slice is None or dropout == 0.0:
            mixed = attend(query, key, value, mask, dropout)
        else:
            with random_numbers_of_slice(self.slice, x.device):
                mixed = attend(query, key, value, mask, dropout)
        y: Tensor = self.output(mixed.transpose(1, 2).flatten(2).to(x.dtype))
        return F.dropout(y, self.dropout, self.training)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> Tensor:
    """Attention of `query` `(batch, heads, T, head_dim)` to `key` and `value` `(batch, kv_heads, S, head_dim)`.

    Without a mask each token looks at itself and the tokens before it. The result has the shape of `query`. PyTorch's
    scaled_dot_product_attention takes a flash kernel where there is one and shares keys among the heads of a group
    without repeating them. Dropout does not go with a block mask.
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        assert dropout == 0.0
        # Autocast, which may have left queries and keys in float32, does not reach FlexAttention.
        query, key = query.to(value.dtype), key.to(value.dtype)
        kernel = flex_attention if torch.compiler.is_compiling() or query.is_cpu else _compiled_flex_attention()
        return cast(Tensor, cast(Any, kernel)(query, key, value, block_mask=mask, enable_gqa=grouped))
    if isinstance(mask, Pieces):
        return _attend_pieces(query, key, value, mask.lengths, dropout)
    square = query.shape[2] == key.shape[2]
    if square and query.dtype == torch.bfloat16 and query.is_cpu and query.shape[2] <= SHORT:
        return _attend_short(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
    )


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """FlexAttention on a GPU is a kernel only once it is compiled; alone it would write out every score."""
    return torch.compile(flex_attention)


def _attend_pieces(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float) -> Tensor:
    """Causal attention within each document; splitting all at once spares the backward pass a zero tensor for each."""
    batch, _, length, _ = query.shape
    queries, keys, values = (
        torch.split(tensor.transpose(0, 1).flatten(1, 2)[None], lengths, dim=2) for tensor in (query, key, value)
    )
    mixed = [attend(*document, None, dropout) for document in zip(queries, keys, values, strict=True)]
    return torch.cat(mixed, dim=2).view(-1, batch, length, query.shape[-1]).transpose(0, 1)


def _attend_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention as two plain products: up to four times as fast as the CPU's flash kernel in bfloat16."""
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if mask is None:
        hidden = query.new_full((length, length), -torch.inf).triu_(1)
    else:
        hidden = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        hidden = hidden.expand(batch, heads, length, length).flatten(0, 1)
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.baddbmm(hidden, query, key.mT, alpha=width**-0.5)
    shares = F.dropout(scores.softmax(dim=-1), dropout)
    return (shares @ value).view(batch, heads, length, width)
