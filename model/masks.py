"""What a token may look at: the tokens before it, in its window, of its document, and whatever a cache holds of them.

A mask depends on the window of a layer alone, so each is made once per forward pass and shared by the layers that have
that window. `None` is the plain case, for which attention has kernels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from config.model import ModelConfig
from model.cache import KVCache

# Up to this many tokens a mask is no slower than a call per document; at 1024 the calls take half the time.
SHORT = 512


class Pieces(NamedTuple):
    """Documents one after another over all rows, of so many tokens each; every token sees its own up to itself."""

    lengths: list[int]


Mask = Tensor | BlockMask | Pieces | None
Masks = dict[int | None, Mask]  # by window; None is the whole context


def flex_takes(config: ModelConfig) -> bool:
    """Whether FlexAttention computes the attention of this model: it has no dropout, and no narrower heads than 16."""
    return config.dropout == 0.0 and config.head_dim >= 16


def causal_masks(
    windows: Iterable[int | None],
    shape: tuple[int, int],
    documents: Tensor | None,
    device: torch.device,
    flex: bool,
    fixed: bool = False,
) -> Masks:
    """For tokens of `shape` (batch, T) that see one another: the mask of every window.

    `documents` `(batch, T)` are numbers of documents, each of which is one run of its row: nothing is seen across. With
    `flex` the masks are FlexAttention's, which skips the blocks that are hidden (Dong et al., 2024); on a CPU whole
    documents are attended to one by one, unless the masks are to have a `fixed` shape, as compiled code needs them.
    Elsewhere they are booleans `(batch or 1, 1, T, T)`, true where a query may look.
    """
    return {window: _causal_mask(window, shape, documents, device, flex, fixed) for window in dict.fromkeys(windows)}


def _causal_mask(
    window: int | None,
    shape: tuple[int, int],
    documents: Tensor | None,
    device: torch.device,
    flex: bool,
    fixed: bool,
) -> Mask:
    length = shape[1]
    if window is not None and window >= length:
        window = None
    if window is None and documents is None:
        return None
    if flex:
        return _block_mask(window, shape, documents, device)
    if window is None and documents is not None and length > SHORT and documents.is_cpu and not fixed:
        return _pieces(documents)
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    if window is not None:
        visible = visible.triu_(1 - window)
    if documents is None:
        return visible[None, None]
    return (visible & (documents[:, :, None] == documents[:, None, :]))[:, None]


def _block_mask(
    window: int | None, shape: tuple[int, int], documents: Tensor | None, device: torch.device
) -> BlockMask:
    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        return seen

    batch, length = shape
    rows = None if documents is None else batch
    make = block_masks(device)
    mask: BlockMask = make(visible, rows, None, length, length, device=device.type)
    return mask


def block_masks(device: torch.device) -> Callable[..., BlockMask]:
    """`create_block_mask`, compiled on a GPU: else it would write out what every token sees of every other."""
    return create_block_mask if torch.compiler.is_compiling() or device.type == "cpu" else _compiled_block_masks()


@cache
def _compiled_block_masks() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)


def _pieces(documents: Tensor) -> Pieces:
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return Pieces(torch.diff(starts, append=starts.new_tensor([documents.numel()])).tolist())


def positions_in(documents: Tensor) -> Tensor:
    """How many tokens stand before each in its document: `(batch, T)` int64, of `documents` `(batch, T)`."""
    places = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def cached_masks(windows: Iterable[int | None], cache: KVCache, length: int) -> tuple[Tensor, Masks, bool]:
    """Positions `(batch, T)` of T = `length` new tokens per row of the cache, what they may see, and whether of it.

    The masks are `(batch, 1, T, extent)` over the cache, or, where every row of it is empty, those of the new tokens
    among themselves. Raises ValueError where the cache has no room for the tokens.
    """
    device = cache.lengths.device
    positions = cache.lengths[:, None] + torch.arange(length, device=device)
    if not torch.compiler.is_compiling():
        longest = int(cache.lengths.max())
        if longest + length > cache.extent:
            raise ValueError(f"{length} more tokens do not fit: the cache holds {longest} of {cache.extent}")
        if longest == 0 and length > 1:
            return positions, causal_masks(windows, (cache.batch_size, length), None, device, flex=False), False
    keys, queries = torch.arange(cache.extent, device=device), positions[:, None, :, None]
    masks: Masks = {}
    for window in dict.fromkeys(windows):
        masks[window] = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
    return positions, masks, True
