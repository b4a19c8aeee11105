"""How likely a model finds given continuations of given contexts: the one computation behind multiple-choice tasks.

A context is computed once, however many continuations it has: its keys and values go into the cache, are copied for
each continuation, and only the tokens of the continuations are run after them. What is longer than the model sees loses
tokens from its left, as in `lm-eval`; a continuation that is too long by itself is scored in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache import KVCache
from model.transformer import Transformer

_MOST_ROWS = 256
_CPU_TOKENS, _GPU_TOKENS = 2**13, 2**16  # of a batch in the cache
_CPU_LOGITS, _GPU_LOGITS = 2**22, 2**27  # numbers

Ids = Sequence[int]


class Likelihood(NamedTuple):
    """The logarithm (nats) of the probability of a continuation, and whether greedy decoding would write it."""

    logarithm: float
    greedy: bool


Score = Callable[[Sequence[tuple[Ids, Ids]]], list[Likelihood]]
"""`likelihoods` of a certain model, whatever the number of processes."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Continuations of one context: their places in the list that was asked for, and their tokens."""

    context: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def tail(self) -> int:
        """Tokens that are run after the context: the last of a continuation is never read."""
        return max(len(target) for target in self.targets) - 1


@torch.no_grad()
def likelihoods(
    model: Transformer,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    most_rows: int | None = None,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], object] = torch.distributed.all_reduce,
    advance: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of the second of each of `pairs` after the first, both of at least one token.

    `most_rows` bounds the continuations of one forward pass. `autocast` is the dtype of the matrix products. `advance`
    is told the number of pairs after every batch. With `world_size` above 1 each process computes its share, and all
    get the whole. The model is evaluated without dropout and left in the mode it was in.
    """
    device, context_length = model.token_embedding.weight.device, model.config.context_length
    parts = [(place, part) for place, pair in enumerate(pairs) for part in _parts(*pair, context_length)]
    groups = _grouped([part for _, part in parts], context_length, most_rows or _MOST_ROWS)
    precise = torch.float32 if device.type == "mps" else torch.float64
    found = torch.zeros(len(parts), 2, dtype=precise, device=device)
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(groups[rank::world_size], model, most_rows or _MOST_ROWS):
            places = torch.tensor([place for group in batch for place in group.places], device=device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                found[places] = _score(model, batch).to(precise)
            if advance is not None:
                advance(len(places))
    finally:
        model.train(was_training)
    if world_size > 1:
        all_reduce(found)
    whole = [Likelihood(0.0, True)] * len(pairs)
    for (place, _), (logarithm, greedy) in zip(parts, found.tolist(), strict=True):
        whole[place] = Likelihood(whole[place].logarithm + logarithm, whole[place].greedy and bool(greedy))
    return whole


def _parts(context: Ids, target: Ids, context_length: int) -> Iterator[tuple[Ids, Ids]]:
    """The pair, or, of a target longer than the context, stretches of half a context, each after all before it."""
    if len(target) <= context_length:
        yield context, target
        return
    step = max(1, context_length // 2)
    for start in range(0, len(target), step):
        yield [*context, *target[:start]], target[start : start + step]


def common_length(*rows: Ids) -> int:
    """The number of tokens with which all of `rows` begin."""
    return next((place for place, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


def _grouped(pairs: Sequence[tuple[Ids, Ids]], context_length: int, most: int) -> list[_Group]:
    """The pairs by context, long ones first, so that those of a batch are of one length; at most `most` in a group."""
    members: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for place, (context, target) in enumerate(pairs):
        if not context or not target:
            raise ValueError(f"pair {place} has an empty context or continuation")
        room = context_length + 1 - len(target)  # the last token of the continuation is not read
        members.setdefault(tuple(context[-room:]), []).append((tuple(target), place))
    groups = []
    for context, found in members.items():
        found.sort(reverse=True, key=lambda one: (len(one[0]), one))
        for part in _chunks(found, most):
            groups.append(_Group(context, tuple(place for _, place in part), tuple(target for target, _ in part)))
    return sorted(groups, reverse=True, key=lambda group: (len(group.context), group.tail, group.context, group.places))


def _chunks(items: Iterable[tuple[tuple[int, ...], int]], size: int) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _batches(groups: Sequence[_Group], model: Transformer, most_rows: int) -> Iterator[list[_Group]]:
    """Neighbouring groups, so many that together they fit the context, and that cache and logits stay small."""
    config = model.config
    tokens, logits = (_CPU_TOKENS, _CPU_LOGITS) if model.token_embedding.weight.is_cpu else (_GPU_TOKENS, _GPU_LOGITS)
    batch: list[_Group] = []
    rows = tail = 0
    for group in groups:
        rows, tail = rows + len(group.targets), max(tail, group.tail)
        length = len((batch or [group])[0].context) + tail
        large = rows > most_rows or rows * length > tokens or rows * max(1, tail) * config.padded_vocab_size > logits
        if batch and (large or length > config.context_length):
            yield batch
            batch, rows, tail = [], len(group.targets), group.tail
        batch.append(group)
    if batch:
        yield batch


def _score(model: Transformer, groups: Sequence[_Group]) -> Tensor:
    """`(continuations, 2)` float32, in the order of `groups`: log-likelihood, and 1 where greedy decoding agrees."""
    device = model.token_embedding.weight.device
    owners = [number for number, group in enumerate(groups) for _ in group.targets]
    targets = [target for group in groups for target in group.targets]
    ends = torch.tensor([len(group.context) for group in groups], device=device)
    tail = max(group.tail for group in groups)

    dtype, room = model.token_embedding.weight.dtype, len(groups[0].context) + tail
    cache = KVCache(model.config, len(owners), room, device, dtype)
    contexts = cache.rows(0, len(groups))
    after = model.next_logits(_padded([group.context for group in groups], device), contexts, ends - 1)
    contexts.set_lengths(ends)
    heads = _padded([target[:1] for target in targets], device)
    log_probabilities = after.float().log_softmax(-1)[torch.tensor(owners, device=device)]
    total = log_probabilities.gather(1, heads)[:, 0]
    greedy = log_probabilities.argmax(-1) == heads[:, 0]
    if tail:
        # The row of a context serves its first continuation; the others get copies, in the rows after all contexts.
        firsts = [row for row in range(len(owners)) if row == 0 or owners[row] != owners[row - 1]]
        order = [*firsts, *sorted(set(range(len(owners))) - set(firsts))]
        context_of = torch.tensor([owners[row] for row in order], device=device)
        for memory in (cache.keys, cache.values):
            memory[:, len(groups) :] = memory[:, context_of[len(groups) :]]
        cache.set_lengths(ends[context_of])
        rest = model(_padded([targets[row][:-1] for row in order], device), cache=cache).float().log_softmax(-1)
        wanted = _padded([targets[row][1:] for row in order], device, missing=-1)
        picked = rest.gather(2, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted < 0, 0.0).sum(1)
        right = ((rest.argmax(-1) == wanted) | (wanted < 0)).all(1)
        back = torch.argsort(torch.tensor(order, device=device))
        total, greedy = total + picked[back], greedy & right[back]
    return torch.stack([total, greedy.to(total.dtype)], dim=1)


def _padded(rows: Sequence[Ids], device: torch.device, missing: int = 0) -> Tensor:
    """`(rows, longest)` int64, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[missing] * (longest - len(row))] for row in rows], device=device)
