"""The gradient of an embedding in a compiled graph, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from model.lookup import ExactEmbedding, use_exact_lookups
from tests.small_runs import new_transformer
from training.layout import Layout
from training.parallelism import parallelise


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads that can get in one another's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradient(look_up: Callable[[Tensor], Tensor], weight: Tensor, ids: Tensor, upstream: Tensor) -> Tensor:
    """Of `weight`, in which `look_up` finds the rows."""
    (found,) = torch.autograd.grad(look_up(ids), weight, upstream)
    return found


@pytest.mark.usefixtures("two_threads")
def test_it_is_the_same_every_time_and_that_of_the_plain_table() -> None:
    torch.manual_seed(0)
    plain, ids, upstream = nn.Embedding(8, 64), torch.randint(0, 8, (64, 64)), torch.randn(64, 64, 64)
    wanted = gradient(plain, plain.weight, ids, upstream)
    use_exact_lookups(plain)
    compiled = torch.compile(plain, fullgraph=True)

    assert all(torch.equal(gradient(compiled, plain.weight, ids, upstream), wanted) for _ in range(20))


def test_a_model_that_is_compiled_on_a_cpu_has_such_tables() -> None:
    model = new_transformer("model.position=learned", "model.value_embeddings=all")
    parallelise(model, Layout(), compiling=True)

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert len(tables) > 2 and all(type(table) is ExactEmbedding for table in tables)
