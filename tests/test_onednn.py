"""Large float32 products on a CPU are oneDNN's, and the same as any other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import onednn
from model.loss import linear_cross_entropy
from model.onednn import LEAST, use_onednn
from tests.operators import Operators
from tests.small_runs import RandomSamples, new_transformer, train_here

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="this PyTorch has no oneDNN beside MKL")

WIDE = 512  # so many rows of so many numbers are just enough


def layers(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer that uses oneDNN, and the same one in float64."""
    torch.manual_seed(0)
    fast = nn.Linear(WIDE, WIDE, bias=bias)
    exact = nn.Linear(WIDE, WIDE, bias=bias, dtype=torch.float64)
    exact.load_state_dict(fast.state_dict())
    use_onednn(fast)
    return fast, exact


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_and_its_gradients_are_the_exact_ones_but_for_rounding(bias: bool) -> None:
    assert WIDE**3 == LEAST
    fast, exact = layers(bias)
    x = torch.randn(2, WIDE // 2, WIDE)
    upstream = torch.randn(2, WIDE, WIDE // 2).mT  # column by column in memory
    results = []
    with Operators() as operators:
        for layer, dtype in ((fast, torch.float32), (exact, torch.float64)):
            given = x.to(dtype).requires_grad_()
            y = layer(given)
            results.append([y, *torch.autograd.grad(y, (given, *layer.parameters()), upstream.to(dtype))])

    assert operators.calls.get("linear", 0) == 2  # the product, and the gradient of what was multiplied
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_small_products_and_those_without_gradients_are_as_any_other() -> None:
    fast, _ = layers(bias=True)
    x = torch.randn(WIDE, WIDE)
    plain = nn.functional.linear(x, fast.weight, fast.bias)
    with Operators() as operators:
        assert torch.equal(fast(x[:-1]), nn.functional.linear(x[:-1], fast.weight, fast.bias))
        with torch.no_grad():
            assert torch.equal(fast(x), plain)

    assert not operators.calls.get("linear", 0)


def test_a_weight_that_does_not_learn_gets_no_gradient() -> None:
    fast, _ = layers(bias=False)
    fast.weight.requires_grad_(False)
    x = torch.randn(WIDE, WIDE, requires_grad=True)
    fast(x).sum().backward()

    assert fast.weight.grad is None and x.grad is not None


def test_the_loss_uses_it_and_comes_to_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(WIDE, WIDE, generator=generator), torch.randn(WIDE, WIDE, generator=generator) / 20
    targets = torch.randint(0, WIDE, (WIDE,), generator=generator)

    def loss_and_gradients(dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(given[0], given[1], targets, WIDE)
        return [loss, *torch.autograd.grad(loss, given)]

    with Operators() as operators:
        found = loss_and_gradients(torch.float32)
    assert operators.calls.get("linear", 0) == 2
    for ours, wanted in zip(found, loss_and_gradients(torch.float64), strict=True):
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_training_in_float32_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onednn, "LEAST", 1)
    with Operators() as operators:
        train_here(RandomSamples(8, 32), "training.precision=fp32", "training.max_steps=2")
    assert operators.calls.get("linear", 0) > 2 * 2 * 6 * 2  # steps, directions, matrices of a layer, layers

    with Operators() as operators:
        train_here(RandomSamples(8, 32), "training.precision=bf16", "training.max_steps=2")
    assert not operators.calls.get("linear", 0)


def test_selective_checkpointing_keeps_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST", 1)
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    counts = {}
    for mode in ("none", "selective"):
        model = new_transformer()
        use_onednn(model)
        model.set_gradient_checkpointing(mode)
        with Operators() as operators:
            model(tokens, targets=tokens).backward()
        counts[mode] = operators.calls.get("linear", 0)

    assert counts["selective"] == counts["none"] > 0
