"""Which optimizer moves which parameter, and Muon against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.small_runs import new_transformer, small_config
from training.muon import Muon, muon_step, orthogonalise
from training.optimizers import make_optimizers

SHAPES = [(64, 64), (128, 32), (64, 64), (32, 128), (48, 16)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES]


def give_gradients(parameters: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names(model: nn.Module, group: dict[str, list[Tensor]]) -> set[str]:
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {known[parameter] for parameter in group["params"]}  # type: ignore[index]


class TestGroups:
    @pytest.mark.parametrize("variant", [[], ["model.variant=gpt2-small", "model.n_layers=2", "model.d_model=24"]])
    def test_adamw_decays_matrices_and_nothing_else(self, variant: list[str]) -> None:
        settings = [*variant, "model.vocab_size=100", "training.optimizer=adamw"]
        model = new_transformer(*settings)
        decayed, kept = make_optimizers(model, small_config(*settings).training).parts["adamw"].param_groups
        assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
        assert all(parameter.ndim == 2 for parameter in decayed["params"])
        assert all(name.endswith(("norm.weight", ".bias")) for name in names(model, kept))
        assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))

    def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(self) -> None:
        model = new_transformer()
        parts = make_optimizers(model, small_config().training).parts
        (hidden,) = parts["muon"].param_groups
        assert len(hidden["params"]) == 2 * 6
        assert all(name.startswith("blocks.") for name in names(model, hidden))
        rest = set().union(*(names(model, group) for group in parts["adamw"].param_groups))
        assert {"token_embedding.weight", "head.weight", "final_norm.weight"} <= rest
        assert not rest & names(model, hidden)

    def test_tables_and_scalars_that_skip_layers_are_adamws(self) -> None:
        settings = ["model.value_embeddings=all", "model.residual_scaling=true"]
        model = new_transformer(*settings)
        parts = make_optimizers(model, small_config(*settings).training).parts
        (hidden,) = parts["muon"].param_groups
        scalars = [f"blocks.{layer}.{name}_scale" for layer in (0, 1) for name in ("residual", "embedding")]
        tables = {f"value_embeddings.{layer}.weight" for layer in (0, 1)}
        decayed, kept = (names(model, group) for group in parts["adamw"].param_groups)
        assert set(scalars) <= kept and tables <= decayed
        assert {f"blocks.{layer}.attention.value_gate.weight" for layer in (0, 1)} <= names(model, hidden)

    def test_frozen_parameters_are_in_no_group(self) -> None:
        model = new_transformer()
        model.token_embedding.weight.requires_grad_(False)
        optimizers = make_optimizers(model, small_config().training)
        assert all(parameter is not model.token_embedding.weight for parameter in optimizers.parameters)

    def test_the_schedule_scales_every_group_from_its_own_rate(self) -> None:
        optimizers = make_optimizers(new_transformer(), small_config().training)
        optimizers.set_rate_factor(0.5)
        optimizers.set_rate_factor(0.25)
        rates = {group["lr"] for part in optimizers.parts.values() for group in part.param_groups}
        assert rates == {0.02 / 4, 0.003 / 4}


class TestMuon:
    def test_moves_matrices_as_pytorchs_own_does(self) -> None:
        ours, theirs = matrices(), matrices()
        first, second = (
            Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1),
            torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1),
        )
        for step in range(5):
            give_gradients(ours, step)
            give_gradients(theirs, step)
            first.step()
            second.step()  # type: ignore[no-untyped-call]
        for mine, reference, begun in zip(ours, theirs, matrices(), strict=True):
            moved = (reference - begun).norm()
            assert (mine - reference).norm() < 0.02 * moved  # theirs multiplies in bfloat16 always
            buffers = first.state[mine]["momentum_buffer"], second.state[reference]["momentum_buffer"]
            torch.testing.assert_close(*buffers)

    def test_orthogonalises_every_matrix_of_a_stack(self) -> None:
        stack = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
        found = orthogonalise(stack, 5, torch.float32)
        assert found.shape == stack.shape
        singular = torch.linalg.svdvals(found)
        assert 0.6 < singular.min() and singular.max() < 1.3
        for matrix, result in zip(stack, found, strict=True):
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            assert (result - left @ right).norm() < 0.35 * (left @ right).norm()
            torch.testing.assert_close(result, orthogonalise(matrix[None], 5, torch.float32)[0])

    def test_a_zero_gradient_moves_nothing(self) -> None:
        (weight,) = parameters = [nn.Parameter(torch.ones(4, 6))]
        weight.grad = torch.zeros(4, 6)
        Muon(parameters, lr=0.02).step()
        assert torch.equal(weight, torch.ones(4, 6))

    def test_refuses_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match="matrices only"):
            Muon([nn.Parameter(torch.ones(3))], lr=0.1)

    def test_takes_or_leaves_a_step_on_the_device_without_looking(self) -> None:
        """The form that runs on a GPU, where `take` cannot be read."""
        scalars = (torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.9))
        results = []
        for take, gradient in ((None, 1.0), (torch.ones(()), 1.0), (torch.zeros(()), torch.nan)):
            weights, buffers = [torch.eye(4, 6)], [torch.ones(4, 6)]
            muon_step(weights, [torch.full((4, 6), gradient)], buffers, take, *scalars, 5, torch.float32)
            results.append([*weights, *buffers])
        assert all(torch.equal(taken, plain) for taken, plain in zip(results[1], results[0], strict=True))
        assert torch.equal(results[2][0], torch.eye(4, 6)) and torch.equal(results[2][1], torch.ones(4, 6))

    def test_is_compiled_once_whatever_the_schedule_does(self) -> None:
        counter = CompileCounter()
        step = torch.compile(muon_step, fullgraph=True, dynamic=False, backend=counter)
        weights, buffers = [torch.randn(8, 8) for _ in range(3)], [torch.zeros(8, 8) for _ in range(3)]
        for rate in (0.1, 0.05, 0.01):
            scalars = (torch.ones(()), torch.tensor(rate), torch.tensor(rate / 2), torch.tensor(0.9 + rate))
            step(weights, [torch.randn(8, 8) for _ in range(3)], buffers, *scalars, 5, torch.float32)
        assert counter.frame_count == 1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_skipped_step_changes_nothing_whatever_the_gradient(optimizer: str) -> None:
    settings = [f"training.optimizer={optimizer}"]
    model = new_transformer(*settings)
    optimizers = make_optimizers(model, small_config(*settings).training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(torch.tensor(False))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizers.step(torch.tensor(True))
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizers.state_dict(), state, rtol=0, atol=0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(torch.tensor(False))
    assert not torch.equal(model.output_weight, weights["head.weight"])


def test_a_resumed_optimizer_keeps_its_moments_and_takes_the_new_rates() -> None:
    model = new_transformer()
    before = make_optimizers(model, small_config().training)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before.step(torch.tensor(False))
    after = make_optimizers(model, small_config("training.adamw.learning_rate=0.001").training)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    after.set_rate_factor(1.0)
    assert {group["lr"] for group in after.parts["adamw"].param_groups} == {0.001}
    saved, loaded = (each.state_dict()["adamw"]["state"] for each in (before, after))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
