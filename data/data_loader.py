"""From token files to batches, in an order that is a pure function of (seed, epoch, k).

Sample k of epoch e is sample `permute(k, len(source), seed, e)` of the source. Nothing is remembered but how many
samples of that endless order have been handed out, so a run resumes at once from one integer, on any number of devices.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import repeat
from queue import Empty, Queue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from config.errors import UserError
from data.permutation import permute
from data.tokens import TokenFiles

IGNORED = -100  # the target that carries no loss
ORDER_SAMPLES = 4096  # indices computed at once, since a call of the permutation costs as much for one


class Batch(NamedTuple):
    """One step's share of a device: `inputs` and `targets` are (rows, time) int64; a target of -100 is not trained."""

    inputs: torch.Tensor
    targets: torch.Tensor


class SampleSource(Protocol):
    """Anything with numbered training samples of one length."""

    def __len__(self) -> int:
        """Samples per epoch."""

    def sample(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and targets of one sample, each (time,), of any integer type; targets may hold -100."""


class TokenWindows:
    """Windows of `context_length + 1` tokens, each beginning where the last one's inputs end.

    So every token but the first is a target once per epoch (up to a rest that fills no window). `UserError` where the
    split is shorter than one window, or a file holds an id outside the vocabulary.
    """

    def __init__(self, tokens: TokenFiles, context_length: int) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.vocab_size = tokens.manifest.vocab_size
        if len(self) < 1:
            raise UserError(
                f"The {tokens.split} split in {tokens.directory} has {len(tokens):,} tokens, fewer than one window of "
                f"{context_length + 1:,}. Add text, or lower model.context_length or training.sequence_length."
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def sample(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and the same moved on by one token, each (context_length,), as stored (uint16 or uint32)."""
        window = self.tokens.read(index * self.context_length, self.context_length + 1)
        largest = int(window.max())
        if largest >= self.vocab_size:
            raise UserError(
                f"The token files in {self.tokens.directory} are damaged: they hold id {largest}, the vocabulary ends "
                f"at {self.vocab_size - 1}. Run python data/preprocess.py --force."
            )
        return window[:-1], window[1:]


class DataLoader:
    """Endless batches of `source`, epoch after epoch; an epoch's last samples share a batch with the next one's first.

    `batch_size` counts the sequences of a step over all ranks; rank r gets rows r*b ... (r+1)*b of it, with
    b = batch_size / world_size. `sizes` are those of the batches to come, where they differ from one another: an
    endless iterator of multiples of `world_size`, left to the loader's thread. `cursor` is the number of samples of the
    global order in all batches yielded so far, the same on every rank; give it back to continue. A thread prepares
    `prefetch_batches` ahead and ends with `close()`, the `with` block, or the loader's own life. With `pin_memory`
    every batch lies in page-locked memory of its own, which PyTorch's allocator does not hand out again before copies
    from it are done.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: int = 0,
        sizes: Iterator[int] | None = None,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if batch_size % world_size:
            raise UserError(
                f"A batch of {batch_size} sequences cannot be shared by {world_size} devices: "
                f"choose training.batch_size as a multiple of {world_size}."
            )
        if len(source) < 1:
            raise UserError("There is no sample to train on.")
        self.source = source
        self.cursor = cursor
        self._order = _Order(source, seed, rank, world_size)
        self._sizes = repeat(batch_size) if sizes is None else sizes
        self._pin_memory = pin_memory
        self._queue: Queue[tuple[Batch, int] | BaseException] = Queue(maxsize=prefetch_batches)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize[Any, DataLoader] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the source so far."""
        return self.cursor / len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the data loader is closed")
        if self._thread is None:
            self._start()
        prepared = self._queue.get()
        if isinstance(prepared, BaseException):
            self.close()
            raise prepared
        batch, size = prepared
        self.cursor += size
        return batch

    def _start(self) -> None:
        device = torch.cuda.current_device() if self._pin_memory else None
        self._thread = threading.Thread(
            target=_prefetch,
            args=(self._order, self.cursor, self._sizes, device, self._queue, self._stop),
            name="data-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._queue, self._stop, self._thread)
        self._thread.start()

    def close(self) -> None:
        """End the background thread; what it had prepared is dropped, `cursor` stays."""
        self._stop.set()
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Order(NamedTuple):
    """Which samples a rank takes of each global batch."""

    source: SampleSource
    seed: int
    rank: int
    world_size: int

    def indices(self, cursor: int, sizes: Sequence[int]) -> list[NDArray[np.int64]]:
        """Samples of the next batches, which are of these sizes over all ranks: an array of (rows,) for each."""
        length = len(self.source)
        rows = np.array(sizes, dtype=np.int64) // self.world_size
        ends = np.cumsum(rows)  # of this rank's rows
        starts = cursor + np.cumsum(sizes) - sizes + self.rank * rows  # of its share in each batch
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - rows), rows)
        epochs, within = positions // length, positions % length
        indices = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            chosen = epochs == epoch
            indices[chosen] = permute(within[chosen], length, self.seed, epoch)
        return np.split(indices, ends[:-1])

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples of these indices, shape (rows,)."""
        pairs = [self.source.sample(index) for index in indices.tolist()]
        shape = (len(pairs), len(pairs[0][0]))
        inputs, targets = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
        input_rows, target_rows = inputs.numpy(), targets.numpy()
        for row, (sample_inputs, sample_targets) in enumerate(pairs):
            input_rows[row] = sample_inputs
            target_rows[row] = sample_targets
        return Batch(inputs, targets)


def _prefetch(
    order: _Order,
    cursor: int,
    sizes: Iterator[int],
    device: int | None,
    queue: Queue[tuple[Batch, int] | BaseException],
    stop: threading.Event,
) -> None:
    """The thread's work. It holds no reference to the loader, so that the loader can be collected."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        while True:
            coming = [next(sizes)]
            while sum(coming) < min(ORDER_SAMPLES, len(order.source)) * order.world_size:
                coming.append(next(sizes))
            for indices, size in zip(order.indices(cursor, coming), coming, strict=True):
                if stop.is_set():
                    return
                batch = order.batch(indices)
                if device is not None:
                    batch = Batch(batch.inputs.pin_memory(), batch.targets.pin_memory())
                queue.put((batch, size))
            cursor += sum(coming)
    except BaseException as error:
        queue.put(error)


def _shut_down(
    queue: Queue[tuple[Batch, int] | BaseException], stop: threading.Event, thread: threading.Thread
) -> None:
    """Stop the thread and wait for its end: it may hang in `put`, which an emptied queue lets pass, then sees `stop`.

    The garbage collector may call this from the thread itself, which then cannot wait for itself.
    """
    stop.set()
    while thread.is_alive():
        try:
            while True:
                queue.get_nowait()
        except Empty:
            if thread is threading.current_thread():
                return
            thread.join(timeout=0.05)
