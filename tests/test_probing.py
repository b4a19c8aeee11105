"""The micro-batch that fits, and what is said where one did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config.errors import UserError
from model.transformer import Transformer
from tests.small_runs import RandomSamples, metrics, new_transformer, train_here, trained_weights
from training.distributed import Process
from training.precision import Precision
from training.probing import largest_micro_batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fitting(model: Transformer, memory: int | None, rows: int = 24, length: int = 32, state_bytes: int = 0) -> int:
    process = Process(0, 1, CPU)
    return largest_micro_batch(model, rows, length, Precision("fp32", CPU), process, state_bytes, memory)


def needed(model: Transformer, rows: int) -> int:
    """The least memory, to a hundredth, with which `rows` of 24 sequences are found to fit."""
    low, high = 1, 2**34
    while high > 1.01 * low:
        middle = int((low * high) ** 0.5) + 1
        try:
            fits = fitting(model, middle) >= rows
        except UserError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def test_the_largest_divisor_that_fits_is_found() -> None:
    model = new_transformer()
    sizes = [1, 2, 3, 4, 6, 8, 12, 24]
    memory = {size: needed(model, size) for size in sizes}
    assert [fitting(model, memory[size]) for size in sizes] == sizes
    assert fitting(model, None) == 24, "a few megabytes fit into any machine"
    activations = (memory[24] - memory[12]) / 12
    assert memory[3] - memory[2] == pytest.approx(activations, rel=0.5), "every sequence takes as much"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert memory[1] > weights + activations, "there is room for the gradients"
    assert fitting(model, memory[24], state_bytes=int(0.9 * (memory[24] - memory[8]))) in (6, 8)


def test_recomputing_activations_makes_room() -> None:
    model = new_transformer("model.n_layers=6")
    memory = needed(model, 6)
    assert fitting(model, memory) == 6
    model.set_gradient_checkpointing("full")
    assert fitting(model, memory) >= 12


@dataclass(frozen=True, slots=True)
class Crowded(Process):
    """One of two processes. The other has room for fewer sequences, and says so the fourth time it is asked."""

    asked: list[int] = field(default_factory=list)

    def largest(self, number: int) -> int:
        """What a reduction over both would give."""
        self.asked.append(number)
        return max(number, int(len(self.asked) > 3))


def test_all_processes_take_what_fits_in_each() -> None:
    process = Crowded(0, 2, CPU)
    assert largest_micro_batch(new_transformer(), 24, 32, Precision("fp32", CPU), process, memory=2**34) == 3
    assert process.asked == [0, 0, 0, 0], "here there was room"


ROW = 1000


class Card:
    """Stands for the memory of a GPU: `fixed` bytes of a pass, ROW of each sequence, and gradients, if present."""

    def __init__(self, model: Transformer, fixed: int = 0, size: int = 2**40) -> None:
        self.model, self.fixed, self.size = model, fixed, size
        self.peak, self.tried = 0, list[int]()
        model.register_forward_pre_hook(self.run)

    def run(self, _model: object, arguments: tuple[Tensor, ...]) -> None:
        """Note what a pass takes at its highest moment."""
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.tried.append(len(arguments[0]))
        self.peak = max(self.peak, self.fixed + ROW * len(arguments[0]) + gradients)
        if self.peak > self.size:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def forget(self, _device: torch.device) -> None:
        """Begin to look for the highest moment."""
        self.peak = 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(new_transformer())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: card.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", card.forget)
    return card


def share_weights(model: Transformer) -> None:
    """Let `model` pass for one whose weights are sharded."""
    model.__dict__["reshard"] = lambda: None


def fitting_on(card: Card, room: int) -> int:
    process = Process(0, 1, torch.device("cuda"))
    return largest_micro_batch(card.model, 24, 32, Precision("fp32", CPU), process, memory=int(room / 0.9) + 1)


class TestOnAGpu:
    def test_a_pass_finds_the_gradients_of_the_one_before(self, card: Card) -> None:
        """A size whose first pass alone would fit is too large for a step of several."""
        gradients = sum(parameter.nbytes for parameter in card.model.parameters())
        assert fitting_on(card, gradients + 8 * ROW) == 8
        assert card.peak == 0, "what the run is to report is its own"

    @pytest.mark.parametrize("fixed", [0, 5 * ROW])
    def test_processes_that_share_the_weights_never_run_out_of_memory_in_it(self, card: Card, fixed: int) -> None:
        """One that did would leave the others in the middle of a collective operation."""
        gradients = sum(parameter.nbytes for parameter in card.model.parameters())
        room = gradients + fixed + 11 * ROW
        card.size, card.fixed = room, fixed
        assert fitting_on(card, room) == 8 and max(card.tried) == 12, "each for itself"
        card.tried.clear()
        share_weights(card.model)
        assert fitting_on(card, room) == 8 and max(card.tried) == 8

    def test_where_not_even_one_sequence_fits_the_run_ends_without_asking_the_others(self, card: Card) -> None:
        share_weights(card.model)
        card.size = ROW // 2
        process = Crowded(0, 2, torch.device("cuda"))
        with pytest.raises(UserError, match="Not even one sequence of 32 tokens fits into the memory of cuda"):
            largest_micro_batch(card.model, 24, 32, Precision("fp32", CPU), process, memory=2**34)
        assert process.asked == [0], "before the pass"


def test_nothing_is_left_behind() -> None:
    model = new_transformer("model.dropout=0.5").train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    fitting(model, None)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_not_even_one_sequence() -> None:
    with pytest.raises(
        UserError, match="Not even one sequence of 32 tokens fits.*training.gradient_checkpointing=full"
    ):
        fitting(new_transformer(), 1000)


def test_a_run_finds_its_micro_batch_and_learns_what_it_would_have(capsys: pytest.CaptureFixture[str]) -> None:
    source = RandomSamples(32, 32)
    found = train_here(source, "training.micro_batch_size=auto", "model.dropout=0.1")
    assert "micro_batch_size: auto chose 8" in "".join(capsys.readouterr())
    given = train_here(source, "training.micro_batch_size=8", "model.dropout=0.1", "training.run_name=given")
    for name, value in trained_weights(given).items():
        assert torch.equal(trained_weights(found)[name], value), name
    assert [row["loss"] for row in metrics(found.run_dir)] == [row["loss"] for row in metrics(given.run_dir)]


class Hungry(Transformer):
    """Runs out of memory with more than `most` sequences, as a GPU or a CPU says it."""

    most = 2
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def forward(self, tokens: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if len(tokens) > self.most:
            raise self.error
        return super().forward(tokens, *arguments, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_names_the_line_to_change(error: BaseException) -> None:
    model = Hungry(new_transformer().config)
    model.error = error
    for size, advice in ((8, 4), (4, 2)):
        with pytest.raises(UserError, match=f"with {size} sequences of 32 .* Set training.micro_batch_size={advice}:"):
            train_here(RandomSamples(32, 32), f"training.micro_batch_size={size}", model=model)
    train_here(RandomSamples(32, 32), "training.micro_batch_size=2", model=model)
    model.most = 0
    with pytest.raises(UserError, match="Set training.gradient_checkpointing=full"):
        train_here(RandomSamples(32, 32), "training.micro_batch_size=1", model=model)
    with pytest.raises(UserError, match="a smaller training.sequence_length"):
        settings = ["training.micro_batch_size=1", "training.gradient_checkpointing=full"]
        train_here(RandomSamples(32, 32), *settings, model=model)


def test_another_error_stays_what_it_is() -> None:
    model = Hungry(new_transformer().config)
    model.most, model.error = 0, RuntimeError("device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        train_here(RandomSamples(32, 32), model=model)
