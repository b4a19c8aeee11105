"""The feed-forward layer of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from config.schema import ModelConfig


class FeedForward(nn.Module):
    """Two matrices around GELU (Hendrycks and Gimpel, 2016) or squared ReLU (So et al., 2021), or SwiGLU's three
    (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.feed_forward_dim, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.feed_forward_dim, bias=config.bias)
        self.down = nn.Linear(config.feed_forward_dim, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of `x` `(batch, T, d_model)` by itself."""
        hidden: Tensor = self.up(x)
        if self.activation == "swiglu":
            hidden = F.silu(self.gate(x)) * hidden
        elif self.activation == "squared_relu":
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return F.dropout(self.down(hidden), self.dropout, self.training)
