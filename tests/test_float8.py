"""Matrix products in 8 bits: the scaling, and that a model trained with them is the same model.

PyTorch computes them on a CPU as well, far slower, with the same types and scales as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from config.errors import UserError
from model.float8 import Float8Linear, scaled, use_float8
from tests.small_runs import (
    RandomSamples,
    differing,
    metrics,
    new_transformer,
    small_config,
    train_here,
    trained_weights,
)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6])
def test_a_scaled_tensor_stands_for_what_it_was_whatever_its_size(dtype: torch.dtype, size: float) -> None:
    tensor = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * size
    values, scale = scaled(tensor, dtype)
    assert values.dtype == dtype and scale.shape == () and scale.dtype == torch.float32
    if size > 1e-12:
        assert values.float().abs().max() == torch.finfo(dtype).max
        # Half a unit in the last place of the largest numbers, of 3 and 2 binary digits.
        step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[dtype]
        error = (values.float() * scale - tensor).abs()
        assert (error <= step * tensor.abs() + 2**-6 * tensor.abs().max() * step).all()
    assert torch.isfinite(values.float()).all()


def test_a_layer_and_its_gradients_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    exact, model = nn.Linear(64, 32), nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 32)])})
    layer = model.get_submodule("blocks.0")
    layer.load_state_dict(exact.state_dict())
    assert use_float8(model) == ["blocks.0"]
    results = []
    for each in (layer, exact):
        x = (3 * torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(1))).requires_grad_()
        y = each(x)
        upstream = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, (x, *each.parameters()), upstream)])
    for found, wanted in zip(*results, strict=True):
        error = (found.float() - wanted).norm() / wanted.norm()
        assert 0 < error < 0.1


def test_without_gradients_or_with_few_rows_the_product_is_exact() -> None:
    layer = nn.Linear(32, 16)
    rows = torch.randn(16, 32)
    expected = layer(rows), layer(rows[:9])
    use_float8(nn.ModuleDict({"blocks": nn.ModuleList([layer])}))
    with torch.no_grad():
        assert torch.equal(layer(rows), expected[0])
    assert torch.equal(layer(rows[:9]), expected[1])
    assert not torch.equal(layer(rows), expected[0])


def test_which_layers_multiply_in_8_bits() -> None:
    model = new_transformer("model.value_embeddings=all")
    names = use_float8(model)
    assert len(names) == 2 * 6 and all(name.startswith("blocks.") and "gate" not in name for name in names)
    assert all(isinstance(model.get_submodule(name), Float8Linear) for name in names)
    assert type(model.head) is nn.Linear
    assert not differing(dict(model.state_dict()), dict(new_transformer("model.value_embeddings=all").state_dict()))


def test_the_model_is_one_graph() -> None:
    model, counter = new_transformer(), CompileCounter()
    use_float8(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for start in range(3):
        tokens = torch.arange(start, start + 64).view(2, 32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(tokens, tokens)
            torch.testing.assert_close(loss, model(tokens, tokens))
        loss.backward()
    assert counter.frame_count == 1


class TestTraining:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_learns_what_bfloat16_learns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("training.trainer.require_float8", lambda precision: None)
        settings = ["training.precision=bf16", "training.max_steps=12"]
        losses, weights = [], []
        for fp8 in ("true", "false"):
            result = train_here(RandomSamples(8, 32), *settings, f"training.fp8={fp8}")
            losses.append([row["loss"] for row in metrics(result.run_dir)])
            weights.append(trained_weights(result))
        assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0][-1] < losses[0][0] - 0.3
        assert differing(weights[0], weights[1])
        assert all(weight.dtype == torch.float32 for weight in weights[0].values())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_is_refused_where_there_is_no_such_gpu(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="needs a GPU with 8-bit matrix products.* Set training.fp8=false"):
            train_here(RandomSamples(8, 32), "training.fp8=true")
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="training.fp8: goes with tensor_parallel=1 alone"):
            small_config("training.fp8=true", "training.tensor_parallel=2")
