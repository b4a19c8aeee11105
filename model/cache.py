"""The key/value cache of generation: static in shape, ragged in content."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config.errors import UserError
from config.model import ModelConfig
from model.devices import free_memory, is_out_of_memory


class KVCache:
    """Keys and values of the tokens that a model has already seen, for a batch of rows of different lengths.

    `keys` and `values` are `(n_layers, batch, kv_heads, max_length, head_dim)` and never change their shape, so that a
    decoding step can be compiled once. `lengths` `(batch,)` int64 counts the tokens each row holds. A forward pass of
    T tokens writes them at `lengths` .. `lengths + T - 1` of each row, attends to everything up to there, and adds T
    to `lengths`. What lies at or past a row's length is never read and is overwritten later, so:

    - for prompts of different lengths, pad them on the right, run one forward pass and then set the true lengths;
    - to take tokens back, set smaller lengths.

    `extent` is the number of positions that attention looks at, `max_length` unless set lower. Keeping it just above
    the longest row saves work; it must not lie below `lengths + T`.

    Raises `UserError` where the device has too little memory for it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        max_length = config.context_length if max_length is None else max_length
        if not 0 < max_length <= config.context_length:
            raise ValueError(f"max_length {max_length} is not within the context of {config.context_length} tokens")
        shape = (config.n_layers, batch_size, config.kv_heads, max_length, config.head_dim)
        device = torch.device(device)
        need, free = 2 * math.prod(shape) * dtype.itemsize, free_memory(device)
        if need > free:
            raise _too_large(batch_size, max_length, need, free)
        try:
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
        except Exception as error:
            if is_out_of_memory(error):
                raise _too_large(batch_size, max_length, need, free) from error
            raise
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.extent = max_length

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """Number of tokens a row can hold."""
        return self.keys.shape[3]

    def set_lengths(self, lengths: Tensor | list[int]) -> None:
        """Declare how many tokens of each row are real; they must have been written already."""
        self.lengths.copy_(torch.as_tensor(lengths))

    def reset(self) -> None:
        """Empty every row."""
        self.lengths.zero_()

    def rows(self, start: int, stop: int) -> KVCache:
        """Rows `start` .. `stop - 1` as a cache of their own that shares this one's memory."""
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, start:stop], self.values[:, start:stop]
        part.lengths, part.extent = self.lengths[start:stop], self.extent
        return part

    def copy_row(self, source: int, target: int, length: int | None = None, begin: int = 0) -> None:
        """Make row `target` hold what row `source` holds, or the first `length` tokens of that.

        Its first `begin` tokens, which are the same already, are not copied.
        """
        length = int(self.lengths[source]) if length is None else length
        for memory in (self.keys, self.values):
            memory[:, target, :, begin:length] = memory[:, source, :, begin:length]
        self.lengths[target] = length

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write `(batch, T, kv_heads, head_dim)` at `positions` `(batch, T)`; return all of the layer up to `extent`.

        Returns two views `(batch, kv_heads, extent, head_dim)`. Where a model has only some of its heads, these come
        first in the cache, and are all that is returned.
        """
        row = torch.arange(self.batch_size, device=positions.device)[:, None]
        own_keys, own_values = self.keys[layer, :, : keys.shape[2]], self.values[layer, :, : keys.shape[2]]
        own_keys[row, :, positions] = keys.to(self.keys.dtype)
        own_values[row, :, positions] = values.to(self.values.dtype)
        return own_keys[:, :, : self.extent], own_values[:, :, : self.extent]


def _too_large(rows: int, length: int, need: int, free: int) -> UserError:
    texts = "A text" if rows == 1 else f"{rows:,} texts at once"
    return UserError(
        f"{texts} of up to {length:,} tokens: their keys and values need {need / 1e9:,.2f} GB of memory, and "
        f"{free / 1e9:,.2f} GB are free. Set generation.context_length (--context-length) lower, or have fewer texts "
        "written at once: --num-samples of scripts/generate.py, --max-concurrent of scripts/serve.py."
    )
