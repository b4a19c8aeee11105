"""Which optimizer moves which parameter, and Muon against PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.small_runs import new_transformer, small_config
from training.muon import Muon, Stack, muon_step
from training.optimizers import make_optimizers
from training.orthogonalisation import iteration, orthogonalise

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
        *decayed, kept = make_optimizers(model, small_config(*settings).training).parts["adamw"].param_groups
        assert {group["weight_decay"] for group in decayed} == {0.1} and kept["weight_decay"] == 0.0
        assert all(parameter.ndim == 2 for group in decayed for parameter in group["params"])
        assert all(name.endswith(("norm.weight", ".bias")) for name in names(model, kept))
        assert sum(len(group["params"]) for group in [*decayed, kept]) == len(list(model.parameters()))

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
        embedding, _, kept = (names(model, group) for group in parts["adamw"].param_groups)
        assert set(scalars) <= kept and embedding == {"token_embedding.weight"} | tables
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

    def test_every_group_has_the_rate_that_is_given_for_it(self) -> None:
        settings = [f"training.adamw.{name}_learning_rate={rate}" for name, rate in (("embedding", 0.3), ("head", 0.4))]
        settings += ["training.adamw.scalar_learning_rate=0.5", "training.adamw.learning_rate=0.6"]
        model = new_transformer()
        found: dict[tuple[str, str], float] = {}
        for optimizer in ("muon", "adamw"):
            parts = make_optimizers(model, small_config(*settings, f"training.optimizer={optimizer}").training).parts
            for group in parts["adamw"].param_groups:
                found |= {(optimizer, name): group["lr"] for name in names(model, group)}
        assert found["muon", "token_embedding.weight"] == found["adamw", "token_embedding.weight"] == 0.3
        assert found["muon", "head.weight"] == found["adamw", "head.weight"] == 0.4
        assert found["muon", "final_norm.weight"] == found["adamw", "final_norm.weight"] == 0.5
        assert found["adamw", "blocks.0.attention.query.weight"] == 0.6

    def test_a_tied_matrix_has_the_rate_of_the_embedding(self) -> None:
        model = new_transformer("model.tie_embeddings=true")
        settings = small_config("training.adamw.embedding_learning_rate=0.3", "training.adamw.head_learning_rate=0.4")
        groups = make_optimizers(model, settings.training).parts["adamw"].param_groups
        assert {group["lr"] for group in groups} == {0.3, 0.003}


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

    def test_a_zero_gradient_moves_nothing(self) -> None:
        (weight,) = parameters = [nn.Parameter(torch.ones(4, 6))]
        weight.grad = torch.zeros(4, 6)
        Muon(parameters, lr=0.02).step()
        assert torch.equal(weight, torch.ones(4, 6))

    def test_refuses_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match="matrices only"):
            Muon([nn.Parameter(torch.ones(3))], lr=0.1)

    @pytest.mark.parametrize("cautious", [False, True])
    def test_takes_or_leaves_a_step_on_the_device_without_looking(self, cautious: bool) -> None:
        """The form that runs on a GPU, where `take` cannot be read."""
        rate, decay, momentum, second_moment = map(torch.tensor, (0.1, 0.2, 0.9, 0.95))
        scalars = (rate, decay, momentum, second_moment)
        results = []
        for take, gradient in ((None, 1.0), (torch.ones(()), 1.0), (torch.zeros(()), torch.nan)):
            weights, buffers = [torch.eye(4, 6)], [torch.ones(4, 6)]
            moments = [torch.ones(4, 1)]
            how = iteration("polar_express", 3)
            given = [torch.full((4, 6), gradient)]
            muon_step(Stack(weights, given, buffers, moments, take, *scalars, cautious, how, torch.float32))
            results.append([*weights, *buffers, *moments])
        assert all(torch.equal(taken, plain) for taken, plain in zip(results[1], results[0], strict=True))
        assert not torch.equal(results[1][0], torch.eye(4, 6))
        for left, before in zip(results[2], (torch.eye(4, 6), torch.ones(4, 6), torch.ones(4, 1)), strict=True):
            assert torch.equal(left, before)

    def test_is_compiled_once_whatever_the_schedule_does(self) -> None:
        counter = CompileCounter()
        step = torch.compile(muon_step, fullgraph=True, dynamic=False, backend=counter)
        weights, buffers = [torch.randn(8, 8) for _ in range(3)], [torch.zeros(8, 8) for _ in range(3)]
        moments = [torch.zeros(8, 1) for _ in range(3)]
        how = iteration("polar_express", 3)
        for rate in (0.1, 0.05, 0.01):
            first, decay, momentum, second_moment = map(torch.tensor, (rate, rate / 2, 0.9 + rate, 0.5 + rate))
            scalars = (first, decay, momentum, second_moment)
            gradients = [torch.randn(8, 8) for _ in range(3)]
            step(Stack(weights, gradients, buffers, moments, torch.ones(()), *scalars, True, how, torch.float32))
        assert counter.frame_count == 1

    def test_a_second_moment_evens_out_the_neurons_by_the_published_formula(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.muon.has_fast_bfloat16", lambda device: False)
        (weight,) = parameters = [nn.Parameter(torch.zeros(6, 9))]
        optimizer = Muon(parameters, lr=0.1, momentum=0.5, orthogonalisation="polar_express", second_moment=0.9)
        buffer = torch.zeros(6, 9, dtype=torch.float64)
        moment, expected = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 9, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            weight.grad = torch.randn(6, 9, generator=generator) * torch.logspace(0, 1.3, 6)[:, None]
            optimizer.step()
            buffer = 0.5 * buffer + 0.5 * weight.grad.double()
            momentum = 0.5 * weight.grad.double() + 0.5 * buffer
            update = orthogonalise(momentum[None], iteration("polar_express", 5), torch.float64)[0]
            moment = 0.9 * moment + 0.1 * update.square().mean(dim=1)
            even = update / moment.sqrt()[:, None]
            expected -= 0.1 * even * update.norm() / even.norm()
        torch.testing.assert_close(weight.detach(), expected.float(), rtol=0, atol=1e-4)
        (state,) = optimizer.state_dict()["state"].values()
        torch.testing.assert_close(state["second_moment"], moment.float()[:, None], rtol=1e-3, atol=0)


def step_once(kind: str, cautious: bool, weight_decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix before its second step, and after it, from the same state."""
    settings = [f"training.optimizer={kind}", f"training.cautious_weight_decay={cautious}"]
    settings += [f"training.{name}.weight_decay={weight_decay}" for name in ("adamw", "muon")]
    model = new_transformer(*settings)
    first = small_config(*settings, "training.adamw.weight_decay=0.0", "training.muon.weight_decay=0.0")
    before = make_optimizers(model, first.training)
    after = make_optimizers(model, small_config(*settings).training)
    give_gradients(list(model.parameters()), seed)
    before.step(torch.tensor(False))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    weight = model.get_parameter("blocks.0.attention.query.weight")
    begin = weight.detach().clone()
    give_gradients(list(model.parameters()), seed + 1)
    after.step(torch.tensor(False))
    return begin, weight.detach().clone()


@pytest.mark.parametrize(("kind", "rate"), [("muon", 0.02), ("adamw", 0.003)])
def test_cautious_decay_falls_where_the_step_shrinks_the_weight_and_nowhere_else(kind: str, rate: float) -> None:
    begin, plain = step_once(kind, cautious=False, weight_decay=0.0)
    _, cautious = step_once(kind, cautious=True, weight_decay=0.5)
    _, decayed = step_once(kind, cautious=False, weight_decay=0.5)
    shrinks = begin * (begin - plain) > 0
    assert 0.3 < shrinks.float().mean() < 0.7
    torch.testing.assert_close(cautious[~shrinks], plain[~shrinks], rtol=0, atol=0)
    torch.testing.assert_close(cautious[shrinks], decayed[shrinks], rtol=0, atol=1e-7)
    torch.testing.assert_close(plain - decayed, rate * 0.5 * begin, rtol=0, atol=1e-7)


@pytest.mark.parametrize("extra", [[], ["training.cautious_weight_decay=true", "training.muon.second_moment=0.9"]])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_skipped_step_changes_nothing_whatever_the_gradient(optimizer: str, extra: list[str]) -> None:
    settings = [f"training.optimizer={optimizer}", *extra]
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
    for name, part in optimizers.state_dict().items():
        torch.testing.assert_close(part["state"], state[name]["state"], rtol=0, atol=0)
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


def test_moments_find_their_parameters_whatever_the_groups_were() -> None:
    """Checkpoints from before embedding and head had groups of their own had two: matrices, and the rest."""
    model = new_transformer()
    before = make_optimizers(model, small_config().training)
    give_gradients(list(model.parameters()), 0)
    before.step(torch.tensor(False))
    state = copy.deepcopy(before.state_dict())
    embedding, head, scalar = state["adamw"]["param_groups"]
    embedding["params"] += head["params"]
    state["adamw"]["param_groups"] = [embedding, scalar]
    after = make_optimizers(model, small_config("training.adamw.head_learning_rate=0.1").training)
    after.load_state_dict(state)
    for part, restored in zip(before.parts.values(), after.parts.values(), strict=True):
        for parameter, moments in part.state.items():
            torch.testing.assert_close(restored.state[parameter], moments, rtol=0, atol=0)
    del state["adamw"]["param_groups"][0]
    with pytest.raises(ValueError, match="another number of parameters"):
        after.load_state_dict(state)
