"""Sorted runs: how a corpus larger than memory is brought into one order, read a few times in all.

1. A task of the first stage sorts as much text as fits its memory, a run. Where it has several, they are merged at its
   end, range of keys by range of keys: each task leaves one sorted file of small blocks, and beside it the first and
   the last key of every block.
2. Where tasks are many, these files are merged in the same way: each part of the order of the corpus is one file then.
3. Whoever wants a range of keys reads the blocks that touch it: its share of the text, and one block more of each file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from config.files import atomic_write, disk_errors, is_remote, scratch_file
from data.pipeline.batches import SCHEMA, text_bytes
from data.pipeline.keys import drop_duplicates, in_order, key_range

RUN_BYTES = 64 << 20
BLOCK_BYTES = 128 << 10  # half as much makes files 2 % larger and reading them a third slower
RANGE_BYTES = 64 << 20  # of text that a task of the later stages holds in memory
PARTS = 256  # of a corpus, unless with so many tasks that this might keep cores idle
DIRECT_FILES = 64  # read as they are by the later stages: beyond the share wanted, at most as many blocks
RUN_SCHEMA = pl.Schema(SCHEMA | {"high": pl.UInt64, "low": pl.UInt64, "split": pl.UInt64})
ARROW_SCHEMA = pa.schema(
    [("source", pa.uint16()), ("id", pa.large_string()), ("text", pa.large_string())]
    + [(name, pa.uint64()) for name in ("high", "low", "split")]
)  # written out: to ask Polars starts its threads, which workers that are forked later would wait for in vain

OnDuplicates = Callable[[pl.DataFrame], None] | None


class Scale(NamedTuple):
    """From what size on text is sorted in several steps; smaller for tests and samples. The outcome is the same."""

    run_bytes: int = RUN_BYTES
    range_bytes: int = RANGE_BYTES
    parts: int = PARTS
    direct_files: int = DIRECT_FILES


class Runs(NamedTuple):
    """The sorted files of a corpus, `00000.arrow` ...: one for each task of the first stage, or for each part."""

    folder: Path
    number: int
    by_part: bool = False

    def path(self, number: int) -> Path:
        """Where file `number` lies."""
        return self.folder / f"{number:05d}.arrow"

    def of(self, part: int) -> list[Path]:
        """The files that hold all there is of one part."""
        return [self.path(number) for number in ([part] if self.by_part else range(self.number))]


@contextmanager
def run_writer(path: Path, on_duplicates: OnDuplicates, run_bytes: int = RUN_BYTES) -> Iterator[RunWriter]:
    """Write keyed documents to `path` (Arrow IPC, LZ4), sorted, holding about `run_bytes` of text at a time; atomic.

    With `on_duplicates`, equal contents are dropped and handed to it: a text that fills the corpus a million times
    over then does not fill one key range of the later stages.
    """
    with RunWriter(path, on_duplicates, run_bytes) as writer:
        yield writer
        with atomic_write(path) as sink:
            blocks = _BlockWriter(sink)
            for frame in writer.in_order():
                blocks.append(frame)
            edges = blocks.finish()
    with atomic_write(edges_path(path)) as file:
        np.save(file, edges)


class RunWriter:
    """Collects documents. What exceeds a run waits, sorted, in a nameless file until all are merged."""

    def __init__(self, path: Path, on_duplicates: OnDuplicates, run_bytes: int) -> None:
        self._path = path
        self._on_duplicates = on_duplicates
        self._run_bytes = run_bytes
        self._frames: list[pl.DataFrame] = []
        self._size = 0
        self._scratch: IO[bytes] | None = None
        self._runs: _BlockWriter | None = None
        self._spilled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame with the columns of `RUN_SCHEMA`."""
        if self._size >= self._run_bytes:
            self._spill()
        self._frames.append(frame.select(list(RUN_SCHEMA)))
        self._size += text_bytes(frame)

    def in_order(self) -> Iterator[pl.DataFrame]:
        """All documents in order, in frames of about a run; once, at the end."""
        if self._runs is None:
            yield self._once(in_order(self._take()))
            return
        self._spill()
        assert self._scratch is not None
        reader = _BlockReader(pa.PythonFile(self._scratch, mode="r"), self._runs.finish())
        ranges = math.ceil(self._spilled / self._run_bytes)
        for number in range(ranges):
            yield self._once(in_order(_frame(reader.batches(*key_range(number, ranges)))))

    def _take(self) -> pl.DataFrame:
        frames, self._frames, self._size = self._frames, [], 0
        return pl.concat([RUN_SCHEMA.to_frame(), *frames])

    def _spill(self) -> None:
        run = self._once(in_order(self._take()))
        self._spilled += text_bytes(run)
        with disk_errors(self._path):
            if self._runs is None:
                self._scratch = scratch_file(self._path)
                self._runs = _BlockWriter(self._scratch)
            self._runs.append(run)

    def _once(self, frame: pl.DataFrame) -> pl.DataFrame:
        if self._on_duplicates is not None:
            frame, duplicates = drop_duplicates(frame)
            self._on_duplicates(duplicates)
        return frame


class RunReader:
    """Sorted files, opened once for several ranges of keys."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._open = ExitStack()
        self._readers: list[_BlockReader] = []

    def __enter__(self) -> Self:
        for path in self._paths:
            with edges_path(path).open("rb") as file:
                edges = np.load(file)
            self._readers.append(_BlockReader(self._open.enter_context(_source(path)), edges))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def frames(self, first: int, last: int) -> Iterator[pl.DataFrame]:
        """The documents whose `high` lies in first ... last, a block at a time, in order within each file."""
        for reader in self._readers:
            yield from (_frame([batch]) for batch in reader.batches(first, last))

    def read(self, first: int, last: int) -> pl.DataFrame:
        """The same as one frame, in order."""
        return in_order(_frame(chain.from_iterable(reader.batches(first, last) for reader in self._readers)))


class _BlockWriter:
    """Appends sorted frames to an open file, in blocks."""

    def __init__(self, sink: IO[bytes]) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer: Any = pa.ipc.new_file(sink, ARROW_SCHEMA, options=options)
        self._edges: list[tuple[int, int]] = []

    def append(self, frame: pl.DataFrame) -> None:
        blocks = frame["text"].str.len_bytes().cast(pl.Int64).cum_sum() // BLOCK_BYTES
        table, high = _arrow(frame), frame["high"].to_numpy()
        start = 0
        for length in blocks.rle().struct.field("len"):
            self._writer.write_table(table.slice(start, length), max_chunksize=length)
            self._edges.append((int(high[start]), int(high[start + length - 1])))
            start += length

    def finish(self) -> NDArray[np.uint64]:
        """Write the end of the file; the edges of all blocks, shape (blocks, 2)."""
        self._writer.close()
        return np.array(self._edges, np.uint64).reshape(-1, 2)


class _BlockReader:
    """An open file of blocks with their edges."""

    def __init__(self, source: Any, edges: NDArray[np.uint64]) -> None:
        self._reader = pa.ipc.open_file(source)
        self._edges = edges

    def batches(self, first: int, last: int) -> Iterator[Any]:
        """The documents whose `high` lies in first ... last: Arrow batches, each in order."""
        low, high = self._edges[:, 0], self._edges[:, 1]
        for block in np.flatnonzero((low <= np.uint64(last)) & (high >= np.uint64(first))):
            batch = self._reader.get_batch(int(block))
            if low[block] < first or high[block] > last:
                keys = batch.column("high").to_numpy()
                start = int(np.searchsorted(keys, np.uint64(first)))
                batch = batch.slice(start, int(np.searchsorted(keys, np.uint64(last), side="right")) - start)
            yield batch


def edges_path(path: Path) -> Path:
    """Where the first and last keys of the blocks of the run file at `path` stand, uint64 of shape (blocks, 2)."""
    return path.with_suffix(".npy")


def _source(path: Path) -> Any:
    """An Arrow source that reads only the bytes asked for, and keeps none of them."""
    if is_remote(path):
        return pa.PythonFile(path.open("rb", cache_type="none"), mode="r")  # type: ignore[call-overload]
    return pa.OSFile(str(path))


def _frame(batches: Any) -> pl.DataFrame:
    """Arrow batches as one frame."""
    frame = pl.from_arrow(pa.Table.from_batches(batches, ARROW_SCHEMA))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _arrow(frame: pl.DataFrame) -> Any:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
