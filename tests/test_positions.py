"""Rotary positions, plain and scaled for a long context, are those of `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from config.model import RopeScaling
from model.positions import RotaryTables

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
SHORT = RopeScaling(factor=32.0, low_freq_factor=1.5, high_freq_factor=3.0, original_context_length=48)


@pytest.mark.parametrize("scaling", [None, LLAMA3, SHORT], ids=["plain", "llama3", "short"])
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 500_000.0), (128, 10_000.0)])
def test_tables_are_those_of_transformers(scaling: RopeScaling | None, head_dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", **scaling.model_dump(exclude={"original_context_length"})}
        rope["original_max_position_embeddings"] = scaling.original_context_length
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=rope)
    positions = torch.arange(512)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])
    tables = RotaryTables(head_dim, 512, theta, scaling)
    half = head_dim // 2
    torch.testing.assert_close(tables.cos, cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(tables.sin[:, half:], sin[0, :, half:], rtol=0, atol=1e-4)
    torch.testing.assert_close(tables.sin[:, :half], -sin[0, :, :half], rtol=0, atol=1e-4)
    if scaling is not None:
        assert (tables.cos - RotaryTables(head_dim, 512, theta).cos).abs().max() > 1e-2
