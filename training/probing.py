"""How many sequences one forward and backward pass can hold: found by trying, and what to say where it was too many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.section import divisors
from config.training import TrainingConfig
from model.devices import free_memory
from training import randomness
from training.distributed import Process
from training.parallelism import aside
from training.precision import Precision
from training.shares import shares_of

MARGIN = 0.1  # of the memory, left for fragments, for evaluations and for the buffers of communication


def largest_micro_batch(
    model: nn.Module,
    rows: int,
    length: int,
    precision: Precision,
    process: Process,
    state_bytes: int = 0,
    memory: int | None = None,
    sample_rows: int = 1,
) -> int:
    """The largest divisor of `rows` that fits as sequences of `length` tokens, the same in every process.

    Each of the `rows` stands for `sample_rows` sequences.

    On a GPU each size is run, ascending, until one does not fit; everything is freed again. Where the processes share
    the weights, they run it together, and one that ran out of memory would leave the others waiting inside: a size is
    run there only if what the smaller ones took tells that it fits. On a CPU, whose memory ends with a killed process,
    what a pass keeps for its backward half is measured for one and two sequences and carried on.

    `state_bytes` are those that the optimizer is going to take. `memory` is the number of bytes there are for
    gradients, moments and activations; None asks the device. No random number is drawn.

    Raises `UserError` where not even one sequence fits.
    """
    room = (1.0 - MARGIN) * (free_memory(process.device) if memory is None else memory) - state_bytes
    probe = _Probe(model, length, sample_rows, precision, process.device)
    found = 0
    with randomness.undisturbed():
        for size in divisors(rows):
            if probe.together and process.largest(int(probe.expects(size) > room)):
                break
            needed = probe.needs(size)
            if process.largest(int(needed is None or needed > room)):
                break
            found = size
    if not found:
        raise _none_fits(length, process.device)
    return found


class _Probe:
    """Measures what a forward and backward pass needs beside the weights, gradients included.

    `together` says that on a GPU the passes of all processes are one.
    """

    def __init__(
        self, model: nn.Module, length: int, sample_rows: int, precision: Precision, device: torch.device
    ) -> None:
        self.model, self.precision, self.device = model, precision, device
        self.sample_rows, self.length = sample_rows, length
        self.where = next(model.parameters()).device
        self.together = device.type == "cuda" and hasattr(model, "reshard")
        self.gradients = sum(share.part.nbytes for share in shares_of(model))
        self.measured = [(0, self.gradients)]
        self.per_row: int | None = None

    def expects(self, rows: int) -> float:
        """Bytes that a pass over `rows` sequences takes at most, told from smaller ones; 0 where there were none.

        What is taken grows ever more slowly with the sequences, so it stays below the line through the last two.
        """
        if len(self.measured) < 2:
            return 0.0
        (few, less), (many, more) = self.measured[-2:]
        return more + (more - less) / (many - few) * (rows - many)

    def needs(self, rows: int) -> int | None:
        """Bytes at the highest moment of a pass over `rows` sequences; None where the device has not so many."""
        if self.device.type == "cuda":
            return self._highest(rows)
        if self.per_row is None:
            one = self._kept(1)
            self.per_row = max(0, self._kept(2) - one)
            self.fixed = one - self.per_row + self.gradients
        return self.fixed + 2 * rows * self.per_row  # as much again for what the backward pass makes on its way

    def _loss(self, rows: int) -> Tensor:
        tokens = torch.zeros((rows * self.sample_rows, self.length), dtype=torch.int64, device=self.where)
        with self.precision.autocast():
            loss: Tensor = self.model(tokens, tokens)
        return loss

    def _highest(self, rows: int) -> int | None:
        """Of two passes: the second finds gradients in place, as every pass of a step but its first does."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            for _ in range(2):
                self._loss(rows).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
            highest = torch.cuda.max_memory_allocated(self.device) - before
            self.measured.append((rows, highest))
            return highest
        except torch.OutOfMemoryError as error:
            if self.together:
                raise _none_fits(self.length, self.device, rows) from error
            return None
        finally:
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # the run's own highest moment is yet to come

    def _kept(self, rows: int) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with aside(self.model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss(rows)  # held until the sizes are added up: a freed block could come back as another
        total = sum(kept.values())
        del loss
        return total


def _none_fits(length: int, device: torch.device, rows: int = 1) -> UserError:
    if rows > 1:
        return UserError(
            f"Out of memory as training.micro_batch_size=auto tried {rows} sequences of {length:,} tokens. Give a "
            "smaller number in its place."
        )
    return UserError(
        f"Not even one sequence of {length:,} tokens fits into the memory of {device.type}. Set "
        "training.gradient_checkpointing=full or a smaller training.sequence_length, or choose a smaller model."
    )


def memory_advice(training: TrainingConfig, rows: int, micro_rows: int, length: int) -> UserError:
    """What to say when a run with passes of `micro_rows` of a process's `rows` sequences has run out of memory."""
    begin = f"Out of memory with {micro_rows} sequences of {length:,} tokens in a forward pass. "
    if micro_rows > 1:
        smaller = max(size for size in divisors(rows) if size < micro_rows)
        return UserError(
            f"{begin}Set training.micro_batch_size={smaller}: the same is learnt, in more and smaller passes. "
            "Go on from the last checkpoint with --resume latest."
        )
    if training.gradient_checkpointing != "full":
        return UserError(f"{begin}Set training.gradient_checkpointing=full, which computes more and keeps less.")
    return UserError(f"{begin}Set a smaller training.sequence_length, or choose a smaller model.")
