"""Causal self-attention with any number of key/value heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from config.schema import ModelConfig
from model.cache import KVCache
from model.norms import rms_norm
from model.positions import Rotation, rotate


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017), grouped-query where `n_kv_heads` is smaller (Ainslie et al., 2023).

    With `qk_norm`, queries and keys are divided by their root mean square per head (Henry et al., 2020), without a
    learned scale. The products run in PyTorch's scaled_dot_product_attention, which takes a flash kernel where there is
    one and shares keys among the heads of a group without repeating them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads != config.n_heads
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        self.dropout = config.dropout
        width, kv_width = config.n_heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, width, bias=config.bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.output = nn.Linear(width, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mix `x` `(batch, T, d_model)` over time.

        With a cache, the new keys and values go to `positions` `(batch, T)` of it. `mask` `(batch, 1, T, positions)` is
        true where a query may look; without one each token looks at itself and the tokens of `x` before it.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = self.query(x).view(heads), self.key(x).view(heads), self.value(x).view(heads)
        if self.qk_norm:
            query = rms_norm(query, None, self.norm_eps)
            key = rms_norm(key, None, self.norm_eps)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None and positions is not None:
            seen_keys, seen_values = cache.update(self.layer, key.transpose(1, 2), value.transpose(1, 2), positions)
            if mask is not None:
                query, key, value = query.to(seen_keys.dtype), seen_keys, seen_values
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        y: Tensor = self.output(mixed.transpose(1, 2).flatten(2).to(x.dtype))
        return F.dropout(y, self.dropout, self.training)
