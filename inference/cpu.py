"""A model made ready to be decoded on a CPU: where its weights lie, and the kernel that runs tokens through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.binding import bind
from inference.crew import LINE, Crew
from inference.decoding import MATRICES, Memory, Shape, Tokens, Weights, step
from inference.kernels import GELU, SQUARED_RELU, SWIGLU
from inference.multiplication import Operands
from inference.products import DIGITS, EXACT_INT8
from inference.vectors import GROUP
from model.cache import KVCache
from model.loss import soft_capped
from model.quantized import QuantizedLinear
from model.transformer import Transformer

STORED = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8, torch.uint8: np.uint8}
_ACTIVATIONS = {"gelu": GELU, "squared_relu": SQUARED_RELU, "swiglu": SWIGLU}


class CPUModel:
    """Runs a `Transformer` in float32 or bfloat16, quantized or not, on a few tokens at a time.

    Weights are used where they lie, unless a row needs filling; norms, biases and scalars are copied.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        config = model.config
        self._model = model
        self._held: list[Tensor] = []  # what the addresses point into
        self._threads = torch.get_num_threads()
        self._crew = Crew(self._threads)
        self._keys, self._values = _array(cache.keys), _array(cache.values)
        self._tables = [cast(Tensor, table.weight).detach() for table in model.value_embeddings.values()]
        self._vocab_size = cast(int, config.vocab_size)
        self._shape = Shape(
            config.n_heads,
            config.kv_heads,
            config.head_dim,
            config.feed_forward_dim,
            self._vocab_size,
            _ACTIVATIONS[config.activation],
            config.norm == "rmsnorm",
            bool(config.qk_norm),
            config.norm_eps,
        )
        self._weights = self._gather()
        self._exact = EXACT_INT8 and np.int8 in (self._weights.kind.dtype, self._weights.head_kind.dtype)
        self._make_room(1)

    @staticmethod
    def takes(model: Transformer) -> bool:
        """Whether the kernels can compute this model: on a CPU, whole, and of types and layers that they know."""
        layers = [layer for block in model.blocks for layer in _layers(block) if layer is not None]
        weights = [*model.parameters(), *model.buffers()]
        return (
            all(type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" for weight in weights)
            and all(isinstance(layer, (nn.Linear, QuantizedLinear)) for layer in layers)
            and model.token_embedding.weight.dtype in (torch.float32, torch.bfloat16)
            and model.config.qk_norm != "learned"
        )

    def run(
        self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        """Run `tokens[i]` at `positions[i]` of row `rows[i]` of the cache; see `decoding.step`.

        Returns the float32 logits `(len(wanted), vocab_size)` after the tokens `wanted`; the next call overwrites them.
        """
        count = len(tokens)
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise IndexError(f"one of {min(tokens)} to {max(tokens)} is not in a vocabulary of {self._vocab_size}")
        if count > len(self._memory.x):
            self._make_room(1 << (count - 1).bit_length())
        now = self._tokens
        now.counts[:] = count, len(wanted)
        now.ids[:count], now.rows[:count], now.positions[:count] = tokens, rows, positions
        now.wanted[: len(wanted)] = wanted
        for place, table in enumerate(self._tables):
            now.value_rows[place, :count] = F.embedding(torch.tensor(tokens), table).float()
        self._crew.run(step, self._bound)
        return soft_capped(self._logits[: len(wanted)], self._model.config.logit_soft_cap)

    def _make_room(self, tokens: int) -> None:
        """Have memory for steps of so many tokens."""
        tables, width = len(self._tables), self._shape.kv_heads * self._shape.head_dim
        self._memory = self._allocate(tokens)
        self._logits = torch.from_numpy(self._memory.logits)
        ids, rows, positions, wanted = np.zeros((4, tokens), np.int64)
        value_rows = np.zeros((tables, tokens, width), np.float32)
        self._tokens = Tokens(np.zeros(2, np.int64), ids, rows, positions, value_rows, wanted)
        self._bound = bind(self._shape, self._weights, self._memory, self._tokens, self._keys, self._values)

    def _gather(self) -> Weights:
        model, config = self._model, self._model.config
        blocks: list[Any] = list(model.blocks)
        layers = [_layers(block) for block in blocks]
        flat = [layer for block in layers for layer in block if layer is not None]
        kinds = {_numbers(layer).dtype for layer in flat}
        assert len(kinds) == 1, f"the matrices of the blocks are stored as {kinds}"
        head = model.head if model.head is not None else model.token_embedding
        residual = [[block.residual_scale, block.embedding_scale] for block in blocks if config.residual_scaling]
        gates = [block.attention.value_gate.weight for block in blocks if block.attention.value_gate is not None]
        tables = [
            config.value_embedding_layers.index(n) if n in config.value_embedding_layers else -1
            for n in range(config.n_layers)
        ]
        biased = [self._biases(block) for block in layers]
        rotary = model.rotary
        turning = (torch.empty(config.context_length, 0),) * 2 if rotary is None else (rotary.cos, rotary.sin)
        table, places = model.token_embedding.weight, model.position_embedding
        return Weights(
            token_table=_array(table.detach()),
            position_table=_array(table.detach()[:0] if places is None else places.weight.detach()),
            kind=np.empty(0, STORED[kinds.pop()]),
            head_kind=np.empty(0, STORED[_numbers(head).dtype]),
            matrices=np.array([[self._matrix(layer) for layer in block] for block in layers], np.int64),
            head=np.array(self._matrix(head), np.int64),
            qkv_bias=_stacked([bias[0] for bias in biased]),
            output_bias=_stacked([bias[1] for bias in biased]),
            up_bias=_stacked([bias[2] for bias in biased]),
            down_bias=_stacked([bias[3] for bias in biased]),
            norms=_stacked(
                [torch.stack([_norm(block.attention_norm), _norm(block.feed_forward_norm)]) for block in blocks]
            ),
            final_norm=_norm(model.final_norm).numpy(),
            residual_scales=np.array([[scale.item() for scale in pair] for pair in residual], np.float32).reshape(
                -1, 2
            ),
            value_gates=_stacked(gates) if gates else np.empty((0, 0, 0), np.float32),
            value_table=np.array(tables, np.int64),
            windows=np.array([window or 0 for window in config.layer_windows], np.int64),
            cos=turning[0].numpy(),
            sin=turning[1].numpy(),
        )

    def _matrix(self, layer: nn.Module | None) -> tuple[int, int, int]:
        """Addresses of the numbers and scales of a layer, as `multiplication.multiply` takes them."""
        if layer is None:
            return 0, 0, 0
        numbers = _numbers(layer)
        if not isinstance(layer, QuantizedLinear):
            if fill := -numbers.shape[1] % GROUP:
                numbers = F.pad(numbers, (0, fill))
            self._held.append(numbers.contiguous())
            return self._held[-1].data_ptr(), 0, 0
        self._held += [numbers, layer.scales]
        scales = layer.scales.data_ptr()
        return numbers.data_ptr(), *((scales, 0) if layer.bits == 8 else (0, scales))

    def _biases(self, layers: tuple[nn.Module | None, ...]) -> list[Tensor]:
        """Those of queries, keys and values together; of the output; of what feeds the activation; of the last one."""
        query, key, value, output, up, gate, down = layers
        groups = [[query, key, value], [output], [up] if gate is None else [up, gate], [down]]
        found = [[cast(Tensor | None, getattr(layer, "bias")) for layer in group] for group in groups]
        return [torch.cat([bias for bias in group if bias is not None] or [torch.empty(0)]) for group in found]

    def _allocate(self, tokens: int) -> Memory:
        config, shape = self._model.config, self._shape

        def room(width: int, rows: int = tokens) -> Any:
            return np.zeros((rows, width), np.float32)

        exact = self._exact

        def operands(width: int, *threads: int) -> Operands:
            width += -width % GROUP
            digits = np.zeros((self._threads, tokens, DIGITS * width) if exact else (0, 0, 0), np.int8)
            units = np.zeros((self._threads, tokens, 2) if exact else (0, 0, 0))
            return Operands(np.zeros((*threads, tokens, width), np.float32), digits, units)

        query = shape.heads * shape.head_dim
        return Memory(
            x=room(config.d_model),
            embedding=room(config.d_model if config.residual_scaling else 0),
            normal=operands(config.d_model, self._threads),
            qkv=room(query + 2 * shape.kv_heads * shape.head_dim),
            mixed=operands(query),
            hidden=operands(shape.d_ff),
            gate=room(shape.d_ff if config.activation == "swiglu" else 0),
            scores=room(self._keys.shape[3], self._threads),
            logits=room(shape.vocab_size),
            queues=np.zeros((len(MATRICES), self._threads, LINE // 8), np.int64),
        )


def _layers(block: nn.Module) -> tuple[nn.Module | None, ...]:
    """The seven matrices of a block, in the order of `decoding`; the gate is None but in SwiGLU."""
    attention, feed_forward = cast(Any, block).attention, cast(Any, block).feed_forward
    gate = getattr(feed_forward, "gate", None)
    return attention.query, attention.key, attention.value, attention.output, feed_forward.up, gate, feed_forward.down


def _numbers(layer: nn.Module) -> Tensor:
    return layer.numbers if isinstance(layer, QuantizedLinear) else cast(Tensor, layer.weight).detach()


def _array(tensor: Tensor) -> Any:
    """The memory of a tensor as an array; bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _stacked(tensors: Sequence[Tensor]) -> Any:
    return torch.stack([tensor.detach().float() for tensor in tensors]).numpy()


def _norm(norm: nn.Module) -> Tensor:
    """Scale and bias `(2, d_model)` of a norm."""
    scale, bias = cast(Tensor, norm.weight).detach().float(), getattr(norm, "bias", None)
    return torch.stack([scale, torch.zeros_like(scale) if bias is None else bias.detach().float()])
