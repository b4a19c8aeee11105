"""Sampling against transformers' own processors, and the draws against the distribution they should follow."""

from __future__ import annotations

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
    as_int64,
    choose,
    draw,
    filter_logits,
    penalize_repetition,
    uniform,
)

VOCAB_SIZE = 1000


def random_logits(seed: int, rows: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def reference_logits(logits: Tensor, row: SamplingSettings, ids: Tensor) -> Tensor:
    """One row, `(1, vocab)`, through the processors and warpers of transformers, in the order of its `generate`."""
    if row.repetition_penalty != 1.0:
        logits = hf.RepetitionPenaltyLogitsProcessor(penalty=row.repetition_penalty)(ids, logits)
    if row.temperature != 1.0:
        logits = hf.TemperatureLogitsWarper(row.temperature)(ids, logits)
    if row.top_k:
        logits = hf.TopKLogitsWarper(row.top_k)(ids, logits)
    if row.top_p < 1.0:
        logits = hf.TopPLogitsWarper(row.top_p)(ids, logits)
    if row.min_p > 0.0:
        logits = hf.MinPLogitsWarper(row.min_p)(cast(torch.LongTensor, ids), logits)
    return logits


sampling_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, VOCAB_SIZE, 5 * VOCAB_SIZE]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(sampling_settings, min_size=1, max_size=4))
def test_filters_equal_those_of_transformers(seed: int, rows: list[SamplingSettings]) -> None:
    logits = random_logits(seed, len(rows))
    ids = torch.randint(VOCAB_SIZE, (len(rows), 30), generator=torch.Generator().manual_seed(seed))
    present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    batch = BatchSettings(rows)
    penalized = logits
    if batch.repetition_penalty is not None:
        penalized = penalize_repetition(logits, present, batch.repetition_penalty)
    found = filter_logits(penalized, batch)
    for place, row in enumerate(rows):
        expected = reference_logits(logits[place : place + 1], row, ids[place : place + 1])[0]
        torch.testing.assert_close(found[place], expected, rtol=1e-6, atol=1e-6)


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
        SamplingSettings(temperature=0.0),
        SamplingSettings(temperature=0.7, top_k=20),
        SamplingSettings(top_p=0.8, repetition_penalty=1.2),
        SamplingSettings(min_p=0.1),
        SamplingSettings(),
    ]
    logits = random_logits(1, len(rows))
    present = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.1
    seeds, drawn = torch.tensor([3, 4, 5, 6, as_int64(2**64 - 1)]), torch.tensor([0, 7, 2, 9, 1])
    together = choose(logits, BatchSettings(rows), present, seeds, drawn)
    for place, row in enumerate(rows):
        part = slice(place, place + 1)
        alone = choose(logits[part], BatchSettings([row]), present[part], seeds[part], drawn[part])
        assert alone.item() == together[place]


def test_temperature_zero_takes_the_likeliest_token_whatever_else_is_set() -> None:
    logits = random_logits(3, 2)
    rows = [SamplingSettings(temperature=0.0, top_p=0.1, top_k=3, min_p=0.5), SamplingSettings(temperature=1e-30)]
    chosen = choose(logits, BatchSettings(rows), None, torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert chosen.tolist() == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -1.0, 1.5])
    count = 100_000
    uniforms = uniform(torch.full((count,), 11), torch.arange(count))
    tokens = draw(logits.expand(count, -1), uniforms)
    frequencies = torch.bincount(tokens, minlength=6) / count
    probabilities = logits.softmax(-1)
    assert frequencies[3] == 0
    error = (frequencies - probabilities).abs()
    assert bool((error <= 5 * (probabilities * (1 - probabilities) / count).sqrt()).all())


@pytest.mark.parametrize("along", ["counter", "seed"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    count = 100_000
    running, still = torch.arange(count), torch.full((count,), 5)
    values = uniform(still, running) if along == "counter" else uniform(running, still)
    assert 0.0 <= float(values.min()) < 1e-3 and 1 - 1e-3 < float(values.max()) < 1.0
    counts = torch.histc(values, bins=100, min=0.0, max=1.0)
    assert float(((counts - count / 100) ** 2 / (count / 100)).sum()) < 160  # chi-square of 99 degrees, p = 1e-4
    for lag in (1, 2, 7):
        correlation = torch.corrcoef(torch.stack([values[:-lag], values[lag:]]))[0, 1]
        assert abs(float(correlation)) < 5 / count**0.5


def test_the_extremes_of_the_uniforms_give_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3]
