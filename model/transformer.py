"""The decoder-only transformer: one class for GPT-2, Llama and what lies between, switched by `ModelConfig`."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from config.model import ModelConfig
from model.attention import Attention, Shared
from model.cache import KVCache
from model.feed_forward import FeedForward
from model.init import NoDefaultInit, initialise
from model.loss import linear_cross_entropy, soft_capped, token_cross_entropy
from model.masks import cached_masks, causal_masks, flex_takes, positions_in
from model.norms import make_norm
from model.onednn import LINEAR
from model.positions import RotaryTables, Rotation
from model.quantized import QuantizedLinear
from model.sharding import linear_whole

GradientCheckpointing = Literal["none", "selective", "full"]


class Block(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to the residual stream after.

    With `residual_scaling` the stream is scaled before, and the embedding added to it again, by two learned scalars
    that start at 1 and 0 (modded-nanogpt, 2024).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.residual_scale: nn.Parameter | None = None
        self.embedding_scale: nn.Parameter | None = None
        if config.residual_scaling:
            self.residual_scale, self.embedding_scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, shared: Shared, value_embedding: Tensor | None = None) -> Tensor:
        """One step of the residual stream `x` `(batch, T, d_model)`."""
        if self.residual_scale is not None and self.embedding_scale is not None:
            x = x * self.residual_scale + shared.embedding * self.embedding_scale
        x = x + self.attention(self.attention_norm(x), shared, value_embedding)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


class Transformer(nn.Module):
    """A GPT-style language model over `config.vocab_size` tokens.

    Built on a real device, it has the initial weights of seed 0. Built under `torch.device("meta")`, it has none until
    `to_empty` and then `init_weights` or `load_state_dict`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: GradientCheckpointing = "none"
        self.z_loss = 0.0
        self.blocks_compiled = False
        self.position_embedding = self.rotary = self.head = None
        with NoDefaultInit():
            self.token_embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
            if config.position == "learned":
                self.position_embedding = nn.Embedding(config.context_length, config.d_model)
            else:
                self.rotary = RotaryTables(
                    config.head_dim, config.context_length, config.rope_theta, config.rope_scaling
                )
            self.value_embeddings = nn.ModuleDict(
                {
                    str(layer): nn.Embedding(config.padded_vocab_size, config.kv_heads * config.head_dim)
                    for layer in config.value_embedding_layers
                }
            )
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.final_norm = make_norm(config)
            if not config.tie_embeddings:
                self.head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if not self.token_embedding.weight.is_meta:
            self.init_weights(0)

    @property
    def output_weight(self) -> Tensor:
        """The matrix `(padded vocabulary, d_model)` that makes logits: the head's, or the token embedding's if tied."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """Predict the token after each of `tokens` `(batch, T)` int64.

        Without `targets`: logits `(batch, T, vocab_size)`. With `targets` `(batch, T)` int64: the sum of the
        cross-entropy in nats, a float32 scalar, over the targets that are not -100; divide it by their global number.
        With `each`, that of every target by itself, `(batch, T)` float32, 0 where it is -100.
        Where `z_loss` is set, the gradient of the sum also pulls log(sum(exp(logits))) towards 0; see
        `linear_cross_entropy`.
        With a cache, `tokens` continue each row at `cache.lengths`, which grow by T. With `documents` `(batch, T)`,
        integers that are the same along each document, no token sees one of another document, and positions count
        from the beginning of each (rotary ones are relative anyway); they do not go with a cache. Raises ValueError
        where T tokens do not fit into the context or the cache.
        """
        hidden = self._hidden(tokens, cache, documents)
        if targets is not None and each:
            flat, cap = hidden.flatten(0, 1), self.config.logit_soft_cap
            losses = token_cross_entropy(flat, self.output_weight, targets.flatten(), self._vocab_size, cap)
            return losses.view_as(targets)
        if targets is not None:
            flat, cap = hidden.flatten(0, 1), self.config.logit_soft_cap
            return linear_cross_entropy(flat, self.output_weight, targets.flatten(), self._vocab_size, cap, self.z_loss)
        return self._logits(hidden)

    def next_logits(self, tokens: Tensor, cache: KVCache, last: Tensor) -> Tensor:
        """Run `tokens` as `forward` does, but give only the logits after position `last` `(batch,)` of each row.

        Returns `(batch, vocab_size)`. The logits of a whole prompt would take most of the memory for nothing.
        """
        hidden = self._hidden(tokens, cache)
        chosen = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return self._logits(chosen)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits `(..., vocab_size)` of `hidden` `(..., d_model)`."""
        whole = linear_whole(hidden, self.token_embedding.weight) if self.head is None else self.head(hidden)
        return soft_capped(whole[..., : self._vocab_size], self.config.logit_soft_cap)

    def _hidden(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None = None) -> Tensor:
        """The normalised last residual stream `(batch, T, d_model)`."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens do not fit into the context of {self.config.context_length}")
        windows, positions, of_cache = self.config.layer_windows, None, False
        if cache is None:
            flex = tokens.is_cuda and torch.is_grad_enabled() and flex_takes(self.config)
            fixed = self.blocks_compiled or torch.compiler.is_compiling()
            masks = causal_masks(windows, (tokens.shape[0], length), documents, tokens.device, flex, fixed)
        else:
            positions, masks, of_cache = cached_masks(windows, cache, length)
        x = self.token_embedding(tokens)
        rotation: Rotation | None = None
        if self.position_embedding is not None:
            vectors = self.position_embedding.weight
            if documents is not None:
                positions = positions_in(documents)
            x = x + (vectors[:length] if positions is None else self.position_embedding(positions))
        elif self.rotary is not None:
            rotation = self.rotary(length if positions is None else positions)
        x = F.dropout(x, self.config.dropout, self.training)
        shared = Shared(x, rotation, cache, positions, masks, of_cache)
        for layer, block in enumerate(self.blocks):
            table = self.value_embeddings[str(layer)] if str(layer) in self.value_embeddings else None
            x = self._run(block, x, shared, None if table is None else table(tokens))
        if cache is not None:
            cache.lengths += length
        hidden: Tensor = self.final_norm(x)
        return hidden

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing == "none" or not torch.is_grad_enabled():
            return block(*inputs)
        if self.gradient_checkpointing == "full":
            return checkpoint(block, *inputs, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    @property
    def _vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    def init_weights(self, seed: int) -> None:
        """Draw the initial weights; the same seed gives the same ones on every device."""
        initialise(self, self.config, seed)

    def set_gradient_checkpointing(self, mode: GradientCheckpointing) -> None:
        """What the backward pass recomputes to save memory.

        "none": nothing. "selective": all but matrix products and attention. "full": every block from its input.
        """
        self.gradient_checkpointing = mode

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Number of weights, without the rows that pad the vocabulary.

        `non_embedding` leaves out the tables that are only looked up: learned positions, value embeddings, and the
        token embedding unless it is also the head.
        """
        looked_up = sum(table.shape[1] for table in self.value_embeddings.parameters())
        looked_up += 0 if self.head is None else self.config.d_model
        padding = (self.config.padded_vocab_size - self._vocab_size) * (looked_up + self.config.d_model)
        count = sum(parameter.numel() for parameter in self.parameters()) - padding
        matrices = [module for module in self.blocks.modules() if isinstance(module, QuantizedLinear)]
        count += sum(matrix.in_features * matrix.out_features for matrix in matrices)
        if non_embedding:
            count -= self._vocab_size * looked_up
            count -= 0 if self.position_embedding is None else self.position_embedding.weight.numel()
        return count

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations to train on one token of a sequence of `length` tokens, forward and backward.

        Counted as in PaLM, appendix B (Chowdhery et al., 2022): 6 for each weight that multiplies, and 12 * length
        times the width of all heads for the attention of each layer, or the window's length where that is less, without
        credit for the masked half. Recomputation and the rows that pad the vocabulary are not counted: they are not
        useful work. A weight that is frozen has no gradient of its own and counts 4.
        """
        seen = sum(min(length, window or length) for window in self.config.layer_windows)
        attention = 12 * self.config.n_heads * self.config.head_dim * seen
        weights = self.num_parameters(non_embedding=True)
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return 4 * weights + 2 * min(trained, weights) + attention


def _keep_products(_context: Any, operation: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: keep what is dear to recompute, and recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


_aten = torch.ops.aten
DEAR = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    LINEAR,
    flex_attention,
}
