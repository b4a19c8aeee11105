"""Sampling against transformers' own processors, and the draws against the distribution they should follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from inference.sampling import (
    BatchSettings,
    SamplingSettings,
    adjust_logits,
    choose,
    draw,
    filter_logits,
    log_probabilities,
    uniform,
)

VOCAB_SIZE = 1000


def random_logits(seed: int, rows: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def uniforms(seeds: Iterable[int], counters: Iterable[int]) -> Tensor:
    return torch.tensor(list(map(uniform, seeds, counters)), dtype=torch.float64)


def reference_logits(logits: Tensor, row: SamplingSettings, ids: Tensor, counts: Tensor) -> Tensor:
    """One row, `(1, vocab)`, through the processors and warpers of transformers, in the order of its `generate`.

    It has no presence and frequency penalty; they are as OpenAI states them: mu[j] -> mu[j] - c[j] * alpha_frequency -
    float(c[j] > 0) * alpha_presence, where c[j] is how often a token was sampled before.
    """
    if row.logit_bias:
        bias: list[list[list[int] | float]] = [[[token], float(value)] for token, value in row.logit_bias]
        logits = hf.SequenceBiasLogitsProcessor(sequence_bias=bias)(ids, logits)
    if row.repetition_penalty != 1.0:
        logits = hf.RepetitionPenaltyLogitsProcessor(penalty=row.repetition_penalty)(ids, logits)
    for token in counts[0].nonzero()[:, 0].tolist():
        logits[0, token] -= float(counts[0, token]) * row.frequency_penalty + row.presence_penalty
    if row.temperature != 1.0:
        logits = hf.TemperatureLogitsWarper(row.temperature)(ids, logits)
    if row.top_k:
        logits = hf.TopKLogitsWarper(row.top_k)(ids, logits)
    if row.top_p < 1.0:
        logits = hf.TopPLogitsWarper(row.top_p)(ids, logits)
    if row.min_p > 0.0:
        logits = hf.MinPLogitsWarper(row.min_p)(cast(torch.LongTensor, ids), logits)
    if row.typical_p < 1.0:
        logits = hf.TypicalLogitsWarper(row.typical_p)(cast(torch.LongTensor, ids), logits)
    return logits


sampling_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, VOCAB_SIZE, 5 * VOCAB_SIZE]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    typical_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([-0.3, 0.0, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-100.0, -1.0, 5.0]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(sampling_settings, min_size=1, max_size=4))
def test_adjustments_and_filters_equal_those_of_transformers(seed: int, rows: list[SamplingSettings]) -> None:
    logits = random_logits(seed, len(rows))
    before = logits.clone()
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(VOCAB_SIZE, (len(rows), 15), generator=generator)
    text = torch.randint(VOCAB_SIZE // 50, (len(rows), 15), generator=generator)
    ids = torch.cat([prompt, text], dim=1)
    present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    counts = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, text, torch.ones_like(text).int())
    batch = BatchSettings(rows)
    repeating = [place for place, row in enumerate(rows) if row.penalizes_repetition]
    counting = [place for place, row in enumerate(rows) if row.counts_tokens]
    found = filter_logits(adjust_logits(logits, batch, present[repeating], counts[counting]), batch)
    assert torch.equal(logits, before)
    for place, row in enumerate(rows):
        part = slice(place, place + 1)
        expected = reference_logits(logits[part].clone(), row, ids[part], counts[part])[0]
        torch.testing.assert_close(found[place], expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("spread", [0.03, 3.0])
def test_typical_tokens_of_a_large_vocabulary(spread: float) -> None:
    """A flat distribution needs the whole sort, a steep one a part of it."""
    logits = random_logits(1, 3, 20_000) / 3 * spread
    rows = [SamplingSettings(typical_p=0.9), SamplingSettings(), SamplingSettings(typical_p=0.2)]
    found = filter_logits(logits, BatchSettings(rows))
    ids = cast(torch.LongTensor, torch.zeros(1, 1, dtype=torch.int64))
    for place in (0, 2):
        expected = hf.TypicalLogitsWarper(rows[place].typical_p)(ids, logits[place : place + 1])[0]
        # Sums of thousands of tokens in another precision may end a token earlier or later.
        differing = int((found[place].isfinite() != expected.isfinite()).sum())
        assert differing <= (2 if spread < 1 else 0)
        assert int(found[place].isfinite().sum()) < 20_000
    assert torch.equal(found[1], logits[1])


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = random_logits(5, 3)
    tokens = torch.tensor([4, 999, int(logits[2].argmax())])
    own, top, tops = log_probabilities(logits, tokens, 4)
    expected = logits.double().softmax(-1).log()
    torch.testing.assert_close(own.double(), expected[[0, 1, 2], tokens], rtol=1e-5, atol=1e-5)
    assert top.tolist() == logits.argsort(dim=-1, descending=True)[:, :4].tolist()
    torch.testing.assert_close(tops.double(), expected.gather(1, top), rtol=1e-5, atol=1e-5)
    assert top[2, 0] == tokens[2] and tops[2, 0] == own[2]


def test_nucleus_over_a_large_flat_vocabulary_needs_the_whole_sort() -> None:
    logits = random_logits(0, 2, 20_000) / 30
    found = filter_logits(logits, BatchSettings([SamplingSettings(top_p=0.9), SamplingSettings()]))
    expected = hf.TopPLogitsWarper(0.9)(torch.zeros(1, 1, dtype=torch.int64), logits[:1])
    assert 10_000 < int(found[0].isfinite().sum()) < 20_000
    assert (
        abs(int(found[0].isfinite().sum()) - int(expected.isfinite().sum())) <= 2
    )  # cumulative rounding at the border
    assert torch.equal(found[1], logits[1])


def test_equal_logits_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    kept = filter_logits(logits, BatchSettings([SamplingSettings(top_p=0.3)])).isfinite()
    assert kept.tolist() == [[False, True, True, False]]


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows = [
        SamplingSettings(temperature=0.0, logit_bias=((3, 8.0),)),
        SamplingSettings(temperature=0.7, top_k=20, presence_penalty=1.0),
        SamplingSettings(top_p=0.8, repetition_penalty=1.2),
        SamplingSettings(min_p=0.1, frequency_penalty=0.5, repetition_penalty=0.8),
        SamplingSettings(typical_p=0.6),
        SamplingSettings(),
    ]
    logits = random_logits(1, len(rows))
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(3, logits.shape, generator=generator)
    present = torch.rand(logits.shape, generator=generator) < 0.1
    numbers = uniforms([3, 4, 5, 6, 2**64 - 1, 7], [0, 7, 2, 9, 1, 4])
    together = choose(logits, BatchSettings(rows), numbers, present[[2, 3]], counts[[1, 3]])
    for place, row in enumerate(rows):
        part = slice(place, place + 1)
        past = present[part], counts[part]
        alone = choose(logits[part], BatchSettings([row]), numbers[part], *past)
        assert alone.item() == together[place]


def test_what_is_not_allowed_is_never_chosen() -> None:
    logits = random_logits(4, 4)
    rows = [SamplingSettings(temperature=0.0), SamplingSettings(top_p=0.1), SamplingSettings(top_k=1)]
    rows.append(SamplingSettings(logit_bias=((0, 100.0),)))
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    allowed[:, 500:510] = True
    allowed[3, 0] = True
    chosen = choose(logits, BatchSettings(rows), uniforms(range(4), range(4)), allowed=allowed)
    best = 500 + int(logits[0, 500:510].argmax())
    assert chosen[0] == best and all(500 <= token < 510 for token in chosen[:3].tolist()) and chosen[3] == 0


def test_temperature_zero_takes_the_likeliest_token_whatever_else_is_set() -> None:
    logits = random_logits(3, 2)
    rows = [SamplingSettings(temperature=0.0, top_p=0.1, top_k=3, min_p=0.5), SamplingSettings(temperature=1e-30)]
    chosen = choose(logits, BatchSettings(rows))
    assert chosen.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "row",
    [
        SamplingSettings(temperature=1.5, top_p=0.7),
        SamplingSettings(typical_p=0.5),
        SamplingSettings(0.8, 20, 0.95, 0.01, 1.3, 0.9, 0.5, 0.2, ((1, 2.0), (2, -3.0))),
    ],
)
def test_tokens_are_chosen_as_often_as_the_reference_says(row: SamplingSettings) -> None:
    """Chi-square of many choices by one row's settings, against transformers' probabilities."""
    size, count = 30, 50_000
    logits = random_logits(8, 1, size) / 3
    ids = torch.arange(12)[None]
    counts = torch.zeros(1, size, dtype=torch.int32)
    counts[0, 6:12] = 1
    expected = reference_logits(logits.clone(), row, ids, counts)[0].softmax(-1).double()
    present = torch.zeros(1, size, dtype=torch.bool)
    present[0, :12] = True
    batch = BatchSettings([row] * count)
    chosen = choose(
        logits.expand(count, -1),
        batch,
        uniforms([21] * count, range(count)),
        present.expand(count, -1),
        counts.expand(count, -1),
    )
    found = torch.bincount(chosen, minlength=size).double()
    possible = expected > 0
    assert int(found[~possible].sum()) == 0 and 3 < int(possible.sum()) < size
    statistic = float(((found - count * expected)[possible] ** 2 / (count * expected[possible])).sum())
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64))) > 1e-4


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -1.0, 1.5])
    count = 100_000
    tokens = draw(logits.expand(count, -1), uniforms([11] * count, range(count)))
    frequencies = torch.bincount(tokens, minlength=6) / count
    probabilities = logits.softmax(-1)
    assert frequencies[3] == 0
    error = (frequencies - probabilities).abs()
    assert bool((error <= 5 * (probabilities * (1 - probabilities) / count).sqrt()).all())


@pytest.mark.parametrize("along", ["counter", "seed"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    count = 100_000
    running, still = range(count), [5] * count
    values = uniforms(still, running) if along == "counter" else uniforms(running, still)
    assert 0.0 <= float(values.min()) < 1e-3 and 1 - 1e-3 < float(values.max()) < 1.0
    counts = torch.histc(values, bins=100, min=0.0, max=1.0)
    assert float(((counts - count / 100) ** 2 / (count / 100)).sum()) < 160  # chi-square of 99 degrees, p = 1e-4
    for lag in (1, 2, 7):
        correlation = torch.corrcoef(torch.stack([values[:-lag], values[lag:]]))[0, 1]
        assert abs(float(correlation)) < 5 / count**0.5


def test_the_extremes_of_the_uniforms_give_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3]
