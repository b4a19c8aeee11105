"""The likelihood of continuations: equal to a plain forward pass, with each context computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config.load import load_config
from evaluation.likelihood import Likelihood, likelihoods
from model.transformer import Transformer

VOCAB_SIZE, CONTEXT = 20, 16


def small_model(*overrides: str) -> Transformer:
    config = load_config(
        [],
        ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", f"model.context_length={CONTEXT}"]
        + [f"model.vocab_size={VOCAB_SIZE}", "model.zero_init_projections=false", "model.init_std=0.3", *overrides],
    )
    return Transformer(config.model).eval()


MODEL = small_model()
tokens = st.integers(0, VOCAB_SIZE - 1)


@torch.no_grad()
def plain(context: Sequence[int], target: Sequence[int], model: Transformer = MODEL) -> tuple[float, bool]:
    """One forward pass over the last tokens that the model sees, or for a long target one over each half a context."""
    if len(target) > CONTEXT:
        half = CONTEXT // 2
        parts = [plain([*context, *target[:at]], target[at : at + half], model) for at in range(0, len(target), half)]
        return sum(total for total, _ in parts), all(greedy for _, greedy in parts)
    window = [*context, *target][-(CONTEXT + 1) :]
    log_probabilities = model(torch.tensor([window[:-1]]))[0, -len(target) :].log_softmax(-1)
    wanted = torch.tensor(list(target))
    total = float(log_probabilities[torch.arange(len(target)), wanted].sum())
    return total, bool((log_probabilities.argmax(-1) == wanted).all())


def agree(found: Sequence[Likelihood], pairs: Sequence[tuple[Any, Any]], model: Transformer = MODEL) -> None:
    wanted = [plain(*pair, model) for pair in pairs]
    assert [one.logarithm for one in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in wanted]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_a_plain_forward_pass_for_any_lengths(data: st.DataObject) -> None:
    contexts = data.draw(st.lists(st.lists(tokens, min_size=1, max_size=30), min_size=1, max_size=4))
    targets = st.lists(tokens, min_size=1, max_size=2 * CONTEXT)
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(contexts), targets), min_size=1, max_size=12))
    agree(likelihoods(MODEL, pairs, most_rows=data.draw(st.integers(1, 8))), pairs)


@pytest.mark.parametrize("overrides", [["model.window=4", "model.window_pattern=SL"], ["model.position=learned"]])
def test_equals_a_plain_forward_pass_with_windows_and_learned_positions(overrides: list[str]) -> None:
    model, generator = small_model(*overrides), np.random.default_rng(0)
    contexts = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in (3, 9, 20)]
    pairs = [(context, generator.integers(0, VOCAB_SIZE, length).tolist()) for context in contexts for length in (1, 6)]
    agree(likelihoods(model, pairs), pairs, model)


def test_the_greedy_choice_is_told() -> None:
    with torch.no_grad():
        written = [7, 3]
        for _ in range(3):
            written.append(int(MODEL(torch.tensor([written]))[0, -1].argmax()))
    best, other = written[2:], [*written[2:4], (written[4] + 1) % VOCAB_SIZE]
    assert [one.greedy for one in likelihoods(MODEL, [([7, 3], best), ([7, 3], other), ([7, 3], best[:1])])] == [
        True,
        False,
        True,
    ]


def test_a_context_is_computed_once_for_all_its_continuations() -> None:
    seen: list[int] = []

    class Counting(Transformer):
        def _hidden(self, tokens: Tensor, *rest: Any, **named: Any) -> Tensor:
            seen.append(tokens.numel())
            return super()._hidden(tokens, *rest, **named)

    model = Counting(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    context = list(range(12))
    pairs = [(context, [first, 5]) for first in range(10)]
    agree(likelihoods(model, pairs), pairs)
    assert sum(seen) == 12 + 10  # and of each continuation the one token that is read
    seen.clear()
    agree(likelihoods(model, [(context, [first]) for first in range(10)]), [(context, [first]) for first in range(10)])
    assert sum(seen) == 12


def test_processes_share_the_work_and_all_know_the_whole() -> None:
    generator = np.random.default_rng(1)
    pairs = [(generator.integers(0, VOCAB_SIZE, 5).tolist(), [number % VOCAB_SIZE, 3]) for number in range(11)]
    whole = likelihoods(MODEL, pairs)
    for world_size in (2, 20):
        parts: list[Tensor] = []
        for rank in range(world_size):
            likelihoods(
                MODEL, pairs, rank=rank, world_size=world_size, all_reduce=lambda found: parts.append(found.clone())
            )
        assert all((part[:, 0] != 0).sum() <= -(-len(pairs) // world_size) for part in parts)
        total = torch.stack(parts).sum(0)
        assert total[:, 0].tolist() == pytest.approx([one.logarithm for one in whole], abs=1e-5)

        def all_reduce(found: Tensor) -> None:
            found.copy_(total)

        shared = likelihoods(MODEL, pairs, rank=1, world_size=world_size, all_reduce=all_reduce)
        assert [one.greedy for one in shared] == [one.greedy for one in whole]


def test_progress_is_told_and_the_mode_is_left() -> None:
    model = small_model("model.dropout=0.5").train()
    model.load_state_dict(MODEL.state_dict())
    done: list[int] = []
    pairs = [([1, 2], [3]), ([4], [5, 6]), ([1, 2], [7])]
    agree(likelihoods(model, pairs, advance=done.append), pairs)
    assert sum(done) == 3 and model.training


def test_bfloat16_products_come_near() -> None:
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([9], [8, 7, 6])]
    found = likelihoods(MODEL, pairs, autocast=torch.bfloat16)
    assert [one.logarithm for one in found] == pytest.approx([plain(*pair)[0] for pair in pairs], rel=0.05)


def test_a_pair_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        likelihoods(MODEL, [([], [2])])
