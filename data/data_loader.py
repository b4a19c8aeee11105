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
from data.places import place_of_tokens
from data.tokens import TokenFiles

IGNORED = -100  # the target that carries no loss
ORDER_SAMPLES = 4096  # indices computed at once, since a call of the permutation costs as much for one


# Inputs and targets of one sample, and perhaps the documents they belong to; see `SampleSource.sample`.
Sample = tuple[NDArray[Any], NDArray[Any]] | tuple[NDArray[Any], NDArray[Any], NDArray[np.int32]]


class Batch(NamedTuple):
    """One step's share of a device: `inputs` and `targets` are (rows, time) int64; a target of -100 is not trained.

    `documents` is (rows, time) int32: the number of the document that each input belongs to, one run per document. It
    is None where the source does not tell.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """The same in page-locked memory."""
        documents = None if self.documents is None else self.documents.pin_memory()
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), documents)

    def micro_batches(self, number: int, length: int, device: torch.device) -> list[Batch]:
        """On `device`, its rows dealt to `number` equal batches in turn, each row cut into rows of `length` tokens."""
        parts = [[None] * number if part is None else part.to(device, non_blocking=True).chunk(number) for part in self]
        cut = [[None if each is None else each.view(-1, length) for each in part] for part in parts]
        return [Batch(*members) for members in zip(*cut, strict=True)]


class SampleSource(Protocol):
    """Anything with numbered training samples of one length."""

    def __len__(self) -> int:
        """Samples per epoch."""

    def sample(self, index: int) -> Sample:
        """Inputs and targets of one sample, each (time,), of any integer type; targets may hold -100.

        A source whose attention is to stay within documents gives their numbers as well, (time,) int32.
        """


class TokenWindows:
    """Windows of `context_length + 1` tokens, each beginning where the last one's inputs end.

    So every token but the first is a target once per epoch (up to a rest that fills no window). `UserError` where the
    split is shorter than one window, or a file holds an id outside the vocabulary. `with_documents` gives the number of
    the document of each input; an end-of-text id belongs to the document that it ends.
    """

    def __init__(self, tokens: TokenFiles, context_length: int, with_documents: bool = False) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.with_documents = with_documents
        self.vocab_size = tokens.manifest.vocab_size
        if len(self) < 1:
            raise UserError(
                f"The {tokens.split} split in {tokens.directory} has {len(tokens):,} tokens, fewer than one window of "
                f"{context_length + 1:,}. Add text, or lower model.context_length or training.sequence_length."
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def sample(self, index: int) -> Sample:
        """Inputs and the same moved on by one token, each (context_length,), as stored (uint16 or uint32)."""
        start = index * self.context_length
        window = self.tokens.read(start, self.context_length + 1)
        require_known(window, self.vocab_size, self.tokens)
        if not self.with_documents:
            return window[:-1], window[1:]
        # NumPy would turn all of the ends into floating-point numbers to compare them with a Python integer.
        ends, bounds = self.tokens.document_ends, np.array([start, start + self.context_length], dtype=np.uint64)
        first, last = np.searchsorted(ends, bounds, side="right").tolist()
        borders = np.clip(ends[first:last].astype(np.int64) - start, 0, self.context_length)
        lengths = np.diff(borders, prepend=0, append=self.context_length)
        return window[:-1], window[1:], document_numbers(np.repeat(np.arange(first, last + 1), lengths))

    def place(self, index: int) -> str:
        """Where the tokens of a sample lie, in words."""
        return place_of_tokens(self.tokens, index * self.context_length, self.context_length + 1)


def document_numbers(documents: NDArray[np.int64]) -> NDArray[np.int32]:
    """Numbers of documents as a batch holds them: modulo 2 ** 31, by which neighbours still differ."""
    return (documents % 2**31).astype(np.int32)


def require_known(ids: NDArray[Any], vocab_size: int, tokens: TokenFiles) -> None:
    """`UserError` where `ids`, read from `tokens`, has one outside the vocabulary."""
    largest = int(ids.max())
    if largest >= vocab_size:
        raise UserError(
            f"The token files in {tokens.directory} are damaged: they hold id {largest}, the vocabulary ends at "
            f"{vocab_size - 1}. Run python data/preprocess.py --force."
        )


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
        samples = [self.source.sample(index) for index in indices.tolist()]
        shape = (len(samples), len(samples[0][0]))
        inputs, targets = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
        documents = torch.empty(shape, dtype=torch.int32) if len(samples[0]) == 3 else None
        for row, sample in enumerate(samples):
            for part, values in zip((inputs, targets, documents), sample):
                assert part is not None
                part.numpy()[row] = values
        return Batch(inputs, targets, documents)


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
                    batch = batch.pin_memory()
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
