"""Sorted runs: how a corpus larger than memory is brought into one order.

Each task of the first stage sorts as much text as fits its memory and appends it to its file as a run of small blocks;
beside the file stand the first and the last key of every block. A task of the second stage owns a range of keys and
reads just the blocks that touch it. The outcome is the documents sorted by key: however many tasks, runs and ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from config.files import atomic_write, is_remote
from data.pipeline.batches import SCHEMA, text_bytes
from data.pipeline.keys import drop_duplicates, in_order

RUN_BYTES = 64 << 20
BLOCK_BYTES = 256 << 10
RUN_SCHEMA = pl.Schema(SCHEMA | {"high": pl.UInt64, "low": pl.UInt64, "split": pl.UInt64})


@contextmanager
def run_writer(
    path: Path, on_duplicates: Callable[[pl.DataFrame], None] | None, run_bytes: int = RUN_BYTES
) -> Iterator[RunWriter]:
    """Write keyed documents to `path` (Arrow IPC, LZ4) as sorted runs of about `run_bytes` of text; atomic.

    With `on_duplicates`, equal contents within a run are dropped at once and handed to it: a text that fills the corpus
    a million times over then does not fill one key range of the second stage.
    """
    with atomic_write(path) as sink:
        writer = RunWriter(sink, on_duplicates, run_bytes)
        yield writer
        edges = writer.finish()
    with atomic_write(edges_path(path)) as file:
        np.save(file, edges)


class RunWriter:
    """Collects documents until they are a run, sorts them, and appends them to an open file in blocks."""

    def __init__(self, sink: IO[bytes], on_duplicates: Callable[[pl.DataFrame], None] | None, run_bytes: int) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer: Any = pa.ipc.new_file(sink, _arrow(RUN_SCHEMA.to_frame()).schema, options=options)
        self._on_duplicates = on_duplicates
        self._run_bytes = run_bytes
        self._frames: list[pl.DataFrame] = []
        self._size = 0
        self._edges: list[tuple[int, int]] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame with the columns of `RUN_SCHEMA`."""
        self._frames.append(frame.select(list(RUN_SCHEMA)))
        self._size += text_bytes(frame)
        if self._size >= self._run_bytes:
            self._flush()

    def finish(self) -> NDArray[np.uint64]:
        """Write the last run and the end of the file; the edges of all blocks, shape (blocks, 2)."""
        self._flush()
        self._writer.close()
        return np.array(self._edges, np.uint64).reshape(-1, 2)

    def _flush(self) -> None:
        run = in_order(pl.concat(self._frames)) if self._frames else RUN_SCHEMA.to_frame()
        self._frames, self._size = [], 0
        if self._on_duplicates is not None:
            run, duplicates = drop_duplicates(run)
            self._on_duplicates(duplicates)
        blocks = run["text"].str.len_bytes().cast(pl.Int64).cum_sum() // BLOCK_BYTES
        start = 0
        for length in blocks.rle().struct.field("len"):
            block = run.slice(start, length)
            start += length
            self._writer.write_table(_arrow(block), max_chunksize=len(block))
            self._edges.append((block["high"][0], block["high"][-1]))


def read_range(paths: list[Path], first: int, last: int) -> pl.DataFrame:
    """All documents of the run files at `paths` whose `high` lies in first ... last, in order."""
    frames = [RUN_SCHEMA.to_frame()]
    within = pl.col("high").is_between(pl.lit(first, pl.UInt64), pl.lit(last, pl.UInt64))
    for path in paths:
        with edges_path(path).open("rb") as file:
            edges = np.load(file)
        wanted = np.flatnonzero((edges[:, 0] <= np.uint64(last)) & (edges[:, 1] >= np.uint64(first)))
        with _open(path) as source, pa.ipc.open_file(source) as reader:
            for block in wanted:
                frame = pl.from_arrow(reader.get_batch(int(block)))
                assert isinstance(frame, pl.DataFrame)
                # A copy: what a filter leaves would keep the whole block in memory.
                part = pl.from_arrow(_arrow(frame.filter(within)))
                assert isinstance(part, pl.DataFrame)
                frames.append(part)
    return in_order(pl.concat(frames))


def _open(path: Path) -> Any:
    """An Arrow source that reads only the bytes asked for."""
    if is_remote(path):
        return pa.PythonFile(path.open("rb", cache_type="none"))  # type: ignore[call-overload]
    return pa.memory_map(str(path))


def edges_path(path: Path) -> Path:
    """Where the first and last keys of the blocks of the run file at `path` stand, uint64 of shape (blocks, 2)."""
    return path.with_suffix(".npy")


def _arrow(frame: pl.DataFrame) -> Any:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
