"""Choosing the next token: pure functions of `(batch, vocab)` float32 logits, with a setting of its own for every row.

Everything works as in `transformers`, in its order: logit bias, repetition penalty, presence and frequency penalty
(which it lacks; OpenAI's formula), temperature, top-k, top-p, min-p, typical-p. What the filters drop gets the logit
minus infinity.

Randomness is counter-based: the number that decides a row's next token is a hash of that row's seed and of how many
tokens it has drawn before. So there is no generator state to keep, and no row depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-6  # a temperature under this takes the likeliest token; dividing by less would overflow


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one sequence is sampled; each default switches its part off.

    `temperature` 0 takes the likeliest token; `top_k` 0, `top_p` 1 and `typical_p` 1 keep all tokens; `min_p` 0 drops
    none. `repetition_penalty` 1 penalises no token of prompt and text; `presence_penalty` and `frequency_penalty` 0
    none of the text. `logit_bias` holds pairs of a token and what is added to its logit, each token once.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalizes_repetition(self) -> bool:
        """Whether it matters which tokens are in prompt and text."""
        return self.repetition_penalty != 1.0

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often each token has been drawn."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class BatchSettings:
    """The settings of a batch as tensors: filters as one of shape `(batch,)` each, None where no row uses it.

    Penalties touch the rows that use them alone: `repeating` and `counting` are the indices of these rows, int64, and
    the penalties have one entry for each. `bias` is (rows, tokens, what is added).
    """

    def __init__(self, rows: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> None:
        def tensor(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def column(values: Sequence[float], off: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if all(value == off for value in values) else tensor(values, dtype)

        self.greedy = torch.tensor([row.temperature < GREEDY_BELOW for row in rows], device=device)
        self.all_greedy = all(row.temperature < GREEDY_BELOW for row in rows)
        self.any_greedy = any(row.temperature < GREEDY_BELOW for row in rows)
        self.temperature = column([max(row.temperature, GREEDY_BELOW) for row in rows], 1.0)
        self.top_k = column([row.top_k for row in rows], 0, torch.int64)
        self.largest_k = max(row.top_k for row in rows)
        self.top_p = column([row.top_p for row in rows], 1.0, torch.float64)
        self.min_p = column([row.min_p for row in rows], 0.0)
        self.typical_p = column([row.typical_p for row in rows], 1.0, torch.float64)

        repeating = [place for place, row in enumerate(rows) if row.penalizes_repetition]
        self.repeating = tensor(repeating, torch.int64) if repeating else None
        self.repetition_penalty = tensor([rows[place].repetition_penalty for place in repeating])
        counting = [place for place, row in enumerate(rows) if row.counts_tokens]
        self.counting = tensor(counting, torch.int64) if counting else None
        self.presence_penalty = tensor([rows[place].presence_penalty for place in counting])
        self.frequency_penalty = tensor([rows[place].frequency_penalty for place in counting])
        biased = [(place, token, bias) for place, row in enumerate(rows) for token, bias in row.logit_bias]
        self.bias: tuple[Tensor, Tensor, Tensor] | None = None
        if biased:
            places, tokens, biases = zip(*biased, strict=True)
            self.bias = tensor(places, torch.int64), tensor(tokens, torch.int64), tensor(biases)


def choose(
    logits: Tensor,
    settings: BatchSettings,
    uniforms: Tensor | None = None,
    present: Tensor | None = None,
    counts: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The next token of every row, `(batch,)` int64.

    `logits` is `(batch, vocab)`; `uniforms` `(batch,)` float64 are what `draw` needs, unless all rows are greedy;
    `present` and `counts` are what `adjust_logits` needs. With `allowed`, `(batch, vocab)` bool, no other tokens are
    drawn.
    """
    logits = adjust_logits(logits, settings, present, counts)
    if allowed is not None:
        logits = torch.where(allowed, logits, -torch.inf)
    if settings.all_greedy:
        return likeliest(logits)
    assert uniforms is not None, "rows that are not greedy need random numbers"
    chosen = draw(filter_logits(logits, settings), uniforms)
    return torch.where(settings.greedy, likeliest(logits), chosen) if settings.any_greedy else chosen


def likeliest(logits: Tensor) -> Tensor:
    """The place of the largest of each row's `(batch, vocab)` logits, the first of equal ones: `(batch,)` int64."""
    if logits.device.type == "cpu":  # NumPy compares vectors there, PyTorch one number after another
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def adjust_logits(
    logits: Tensor, settings: BatchSettings, present: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Logit bias and penalties, which hold at any temperature: `(batch, vocab)` logits.

    `present` is `(rows of settings.repeating, vocab)` bool, the tokens that are in each row's prompt or text; `counts`
    is `(rows of settings.counting, vocab)`, how often each token has been drawn.
    """
    if settings.bias is not None:
        rows, tokens, bias = settings.bias
        logits = logits.index_put((rows, tokens), logits[rows, tokens] + bias)
    if settings.repeating is not None:
        assert present is not None, "a repetition penalty needs the tokens that are present"
        penalized = penalize_repetition(logits[settings.repeating], present, settings.repetition_penalty)
        logits = logits.index_copy(0, settings.repeating, penalized)
    if settings.counting is not None:
        assert counts is not None, "presence and frequency penalties need the number of each token"
        penalties = settings.presence_penalty, settings.frequency_penalty
        logits = logits.index_copy(0, settings.counting, penalize_counts(logits[settings.counting], counts, *penalties))
    return logits


def filter_logits(logits: Tensor, settings: BatchSettings) -> Tensor:
    """Temperature, top-k, top-p, min-p and typical-p, in that order: the `(batch, vocab)` logits to sample from."""
    if settings.temperature is not None:
        logits = logits / settings.temperature[:, None]
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k, settings.largest_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    if settings.typical_p is not None:
        logits = keep_typical_p(logits, settings.typical_p)
    return logits


def penalize_repetition(logits: Tensor, present: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens already `present` less likely (Keskar et al. 2019, CTRL): positive logits are divided by the row's
    penalty, negative ones multiplied."""
    penalty = penalty[:, None]
    return torch.where(present, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Make tokens less likely for having been drawn (OpenAI's formula): once `presence`, and `frequency` each time.

    `counts` is `(batch, vocab)`, the penalties are `(batch,)`; negative ones make tokens likelier.
    """
    return logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]


def keep_top_k(logits: Tensor, k: Tensor, largest: int) -> Tensor:
    """Keep the `k` largest logits of each row (and their equals).

    `k` is `(batch,)` int64, 0 keeps all; `largest` is the maximum of `k`, known beforehand so that a GPU need not be
    asked for it.
    """
    ranked = logits.topk(min(largest, logits.shape[-1]), dim=-1).values
    smallest_kept = ranked.gather(-1, (k - 1).clamp(0, ranked.shape[-1] - 1)[:, None])
    return _without(logits < smallest_kept.masked_fill((k == 0)[:, None], -torch.inf), logits)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the nucleus (Holtzman et al. 2020): the fewest likeliest tokens that together have probability `p`.

    A token stays when the tokens likelier than it have less than `p` together; equal logits stay or go together, so
    the outcome does not hang on the order of a sort. `p` is `(batch,)` float64; 1 keeps all.
    """
    vocab_size = logits.shape[-1]
    every = p >= 1.0
    probabilities = logits.softmax(dim=-1)
    for count in _ranking_sizes(logits):
        ranked = probabilities.topk(count, dim=-1).values
        if count == vocab_size or bool(((ranked.sum(dim=-1) > p) | every).all()):
            break
    mass = ranked.cumsum(dim=-1, dtype=torch.float64)
    likelier = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    smallest_kept = ranked.masked_fill(likelier >= p[:, None], torch.inf).amin(dim=-1, keepdim=True)
    return _without(probabilities < smallest_kept.masked_fill(every[:, None], 0.0), logits)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Drop tokens less likely than `p` times the likeliest (Nguyen et al. 2024); `p` is `(batch,)`, 0 drops none."""
    threshold = logits.amax(dim=-1, keepdim=True) + p.log()[:, None]
    return _without(logits < threshold, logits)


def keep_typical_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the locally typical set (Meister et al. 2022): the fewest tokens that together have probability `p`, taken
    in the order of how close the surprise at them is to the surprise that is to be expected.

    Tokens as typical as the last one stay with it. `p` is `(batch,)` float64; 1 keeps all.
    """
    vocab_size = logits.shape[-1]
    every = p >= 1.0
    surprise = -logits.log_softmax(dim=-1)
    probabilities = (-surprise).exp()
    distance = (surprise - (surprise * probabilities).nansum(dim=-1, keepdim=True)).abs()
    for count in _ranking_sizes(logits):
        nearest = distance.topk(count, dim=-1, largest=False)
        mass = probabilities.gather(-1, nearest.indices).cumsum(dim=-1, dtype=torch.float64)
        if count == vocab_size or bool(((mass[:, -1] > p) | every).all()):
            break
    last = (mass < p[:, None]).sum(dim=-1, keepdim=True).clamp(max=count - 1)
    largest_kept = nearest.values.gather(-1, last).masked_fill(every[:, None], torch.inf)
    return _without(distance > largest_kept, logits)


def _without(dropped: Tensor, logits: Tensor) -> Tensor:
    """Logits of which some are minus infinity; `masked_fill` takes twice as long on a CPU."""
    return torch.where(dropped, -torch.inf, logits)


def _ranking_sizes(logits: Tensor) -> Iterator[int]:
    """How many of the first tokens to rank, as long as they do not suffice.

    Sorting a whole vocabulary is the slowest step of all on a CPU, and what stays nearly always is small.
    """
    vocab_size = logits.shape[-1]
    if logits.device.type == "cpu":
        yield from (count for count in (512, 4096) if count < vocab_size)
    yield vocab_size


def log_probabilities(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a model thinks of `tokens` `(batch,)`, by its own `logits` `(batch, vocab)`, nothing adjusted or filtered.

    Returns the logarithm of their probability `(batch,)`, the `count` likeliest tokens `(batch, count)`, best first,
    and the logarithms of theirs.
    """
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], top.indices, top.values


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample a token of each row by inverting its cumulative distribution at `uniforms`, `(batch,)` float64 in [0, 1).

    Tokens with the logit minus infinity are never drawn.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    points = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) for any two whole numbers, of which the lowest 64 bits count.

    Two rounds of the mixing function of SplitMix64 (Steele, Lea and Flood 2014), whose outputs for neighbouring inputs
    are as good as independent.
    """
    return (_mix(_mix(seed + _GAMMA) + counter * _GAMMA) >> 11) * 2.0**-53


_GAMMA = 0x9E3779B97F4A7C15
_BITS = (1 << 64) - 1


def _mix(number: int) -> int:
    """SplitMix64's finaliser of the lowest 64 bits."""
    number &= _BITS
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _BITS
    return number ^ (number >> 31)
