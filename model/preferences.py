"""Direct preference optimisation (DPO): the loss of a chosen answer against a rejected one.

Rafailov et al., 2023 (https://arxiv.org/abs/2305.18290); with label smoothing, conservative DPO (Mitchell, 2023,
https://ericmitchell.ai/cdpo.pdf).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Margins(NamedTuple):
    """By how much more likely the chosen answers are than the rejected ones, at the first token of each pair.

    `values` `(rows, time)` float32: log p(chosen) - log p(rejected) in nats. `numbers` `(rows, time)`: which pair it
    is. Both hold where `first` `(rows, time)` bool is true, once for every pair.
    """

    values: Tensor
    numbers: Tensor
    first: Tensor


def first_tokens(documents: Tensor) -> Tensor:
    """Where each document of `documents` `(rows, time)` begins, bool; a negative number is no document."""
    first = documents >= 0
    first[:, 1:] &= documents[:, 1:] != documents[:, :-1]
    return first


def pair_margins(losses: Tensor, documents: Tensor) -> Margins:
    """The margin of every pair of a batch whose rows are in turn of chosen and of rejected answers.

    `losses` `(2 * rows, time)` float32 are the cross-entropies of the tokens that count, 0 elsewhere, and `documents`
    the numbers of the pairs, the same in both rows of a sample (`data.examples.pairs.PairSamples`). Nothing is read
    back from the device.
    """
    numbers = documents[0::2]
    first = first_tokens(numbers)
    difference = losses[1::2] - losses[0::2]
    place = (first.flatten().cumsum(0) - 1).clamp(min=0)
    sums = torch.zeros_like(difference.flatten()).index_add(0, place, difference.flatten())
    return Margins(sums[place].view_as(difference), numbers, first)


def preference_loss(margins: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, in nats, of a model with `margins` against the starting weights with those of `reference`.

    `beta` is how dear it is to leave these behind; `label_smoothing` the share of pairs thought to be the wrong way
    round. Both tensors have the same shape, and so has the result.
    """
    reward = beta * (margins - reference)
    return -(1 - label_smoothing) * F.logsigmoid(reward) - label_smoothing * F.logsigmoid(-reward)
