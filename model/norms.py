"""Normalisation of the residual stream."""

from torch import nn

from config.schema import ModelConfig


def make_norm(config: ModelConfig) -> nn.Module:
    """RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016) over `(..., d_model)`, with learned scale."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
