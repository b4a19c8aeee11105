"""Choosing the next token: pure functions of `(batch, vocab)` float32 logits, with a setting of its own for every row.

The filters are those of `transformers`, in its order: repetition penalty, temperature, top-k, top-p, min-p. What they
drop gets the logit minus infinity.

Randomness is counter-based: the number that decides a row's next token is a hash of that row's seed and of how many
tokens it has drawn before. So there is no generator state to keep, and no row depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-6  # a temperature under this takes the likeliest token; dividing by less would overflow


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one sequence is sampled; each default switches its filter off.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all tokens; `min_p` 0 drops none;
    `repetition_penalty` 1 penalises none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class BatchSettings:
    """The settings of a batch as one tensor per filter, each of shape `(batch,)`; None where no row uses it."""

    def __init__(self, rows: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> None:
        def column(values: Sequence[float], off: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if all(value == off for value in values) else torch.tensor(values, dtype=dtype, device=device)

        self.greedy = torch.tensor([row.temperature < GREEDY_BELOW for row in rows], device=device)
        self.all_greedy = all(row.temperature < GREEDY_BELOW for row in rows)
        self.any_greedy = any(row.temperature < GREEDY_BELOW for row in rows)
        self.temperature = column([max(row.temperature, GREEDY_BELOW) for row in rows], 1.0)
        self.top_k = column([row.top_k for row in rows], 0, torch.int64)
        self.largest_k = max(row.top_k for row in rows)
        self.top_p = column([row.top_p for row in rows], 1.0, torch.float64)
        self.min_p = column([row.min_p for row in rows], 0.0)
        self.repetition_penalty = column([row.repetition_penalty for row in rows], 1.0)


def choose(logits: Tensor, settings: BatchSettings, present: Tensor | None, seeds: Tensor, drawn: Tensor) -> Tensor:
    """The next token of every row, `(batch,)` int64.

    `logits` is `(batch, vocab)`; `present` is `(batch, vocab)` bool, the tokens already in each row, and may be None
    where no row has a repetition penalty; `seeds` and `drawn` are `(batch,)` int64: each row's seed, and how many
    tokens it has drawn before.
    """
    if settings.repetition_penalty is not None:
        assert present is not None, "a repetition penalty needs the tokens that are present"
        logits = penalize_repetition(logits, present, settings.repetition_penalty)
    if settings.all_greedy:
        return logits.argmax(dim=-1)
    chosen = draw(filter_logits(logits, settings), uniform(seeds, drawn))
    return torch.where(settings.greedy, logits.argmax(dim=-1), chosen) if settings.any_greedy else chosen


def filter_logits(logits: Tensor, settings: BatchSettings) -> Tensor:
    """Temperature, top-k, top-p and min-p, in that order: the `(batch, vocab)` logits that are sampled from."""
    if settings.temperature is not None:
        logits = logits / settings.temperature[:, None]
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k, settings.largest_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def penalize_repetition(logits: Tensor, present: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens already `present` less likely (Keskar et al. 2019, CTRL): positive logits are divided by the row's
    penalty, negative ones multiplied."""
    penalty = penalty[:, None]
    return torch.where(present, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: Tensor, largest: int) -> Tensor:
    """Keep the `k` largest logits of each row (and their equals).

    `k` is `(batch,)` int64, 0 keeps all; `largest` is the maximum of `k`, known beforehand so that a GPU need not be
    asked for it.
    """
    ranked = logits.topk(min(largest, logits.shape[-1]), dim=-1).values
    smallest_kept = ranked.gather(-1, (k - 1).clamp(0, ranked.shape[-1] - 1)[:, None])
    return logits.masked_fill((logits < smallest_kept) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the nucleus (Holtzman et al. 2020): the fewest likeliest tokens that together have probability `p`.

    A token stays when the tokens likelier than it have less than `p` together; equal logits stay or go together, so
    the outcome does not hang on the order of a sort. `p` is `(batch,)` float64; 1 keeps all.
    """
    vocab_size = logits.shape[-1]
    every = p >= 1.0
    probabilities = logits.softmax(dim=-1)
    # Sorting a whole vocabulary is the slowest step of all on a CPU, and the nucleus nearly always is small.
    for count in (512, 4096, vocab_size) if logits.device.type == "cpu" else (vocab_size,):
        ranked = probabilities.topk(min(count, vocab_size), dim=-1).values
        if count >= vocab_size or bool(((ranked.sum(dim=-1) > p) | every).all()):
            break
    mass = ranked.cumsum(dim=-1, dtype=torch.float64)
    likelier = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    smallest_kept = ranked.masked_fill(likelier >= p[:, None], torch.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill((probabilities < smallest_kept) & ~every[:, None], -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drop tokens less likely than `p` times the likeliest (Nguyen et al. 2024); `p` is `(batch,)`, 0 drops none."""
    threshold = logits.amax(dim=-1, keepdim=True) + p.log()[:, None]
    return logits.masked_fill(logits < threshold, -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample a token of each row by inverting its cumulative distribution at `uniforms`, `(batch,)` float64 in [0, 1).

    Tokens with the logit minus infinity are never drawn.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    points = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, counter), `(batch,)` float64 from `(batch,)` int64 tensors.

    Two rounds of the mixing function of SplitMix64 (Steele, Lea and Flood 2014), whose outputs for neighbouring inputs
    are as good as independent.
    """
    bits = _mix(_mix(seeds + _GAMMA) + counters * _GAMMA)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def as_int64(seed: int) -> int:
    """Any whole number as a signed 64-bit one, by its lowest 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


_GAMMA = as_int64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (as_int64(0xBF58476D1CE4E5B9), as_int64(0x94D049BB133111EB))


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose product wraps and whose right shift needs the copied sign masked off."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))
