"""Shards: the tokens of one part of the corpus, and their assembly into token files.

A shard holds for each split the flat tokens (`train.bin`) and what is to be known of every document (`train.npy`, a
`TABLE`). Shards in the order of their parts are the corpus in its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.files import atomic_write
from data.pipeline.batches import BATCH_BYTES
from data.tokenization.protocol import Tokenizer
from data.tokens import INDEX_DTYPE, SOURCE_DTYPE, Split, TokenFile

COPY_BYTES = 4 << 20
TABLE = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("source", "<u2"), ("split", "<u8")])


def encode_documents(
    texts: Sequence[str], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The tokens of `texts`, each text followed by the end-of-text id, and where each ends, shape (documents,)."""
    encoded = tokenizer.encode_batch(texts)
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    tokens = np.full(ends[-1], tokenizer.end_of_text_id, dtype)
    start = 0
    for ids, end in zip(encoded, ends):
        tokens[start : end - 1] = ids
        start = end
    return tokens, ends


@contextmanager
def shard_writer(
    folder: Path,
    split: Split,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    batch_documents: int,
    advance: Callable[[int], None],
) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Write documents as the shard in `folder`; gives what takes their frames, one after the other.

    Their column `text` is tokenized batch by batch, and `advance` gets the documents done. The frames have the columns
    `source` and `split`, too, as keyed documents do.
    """
    tables = [np.zeros(0, TABLE)]
    with atomic_write(folder / f"{split}.bin") as file:

        def add(frame: pl.DataFrame) -> None:
            table = np.zeros(len(frame), TABLE)
            table["bytes"] = frame["text"].str.len_bytes().to_numpy()
            table["source"], table["split"] = frame["source"].to_numpy(), frame["split"].to_numpy()
            for first, last in _slices(np.cumsum(table["bytes"], dtype=np.uint64), batch_documents):
                tokens, ends = encode_documents(frame["text"][first:last].to_list(), tokenizer, dtype)
                file.write(tokens.astype(dtype.newbyteorder("<"), copy=False).data)
                table["tokens"][first:last] = np.diff(ends, prepend=0)
                advance(last - first)
            tables.append(table)

        yield add
    with atomic_write(folder / f"{split}.npy") as file:
        np.save(file, np.concatenate(tables))


def read_table(shard: Path, split: Split) -> NDArray[Any]:
    """What a shard says of the documents of a split, `TABLE`, shape (documents,)."""
    with (shard / f"{split}.npy").open("rb") as file:
        table: NDArray[Any] = np.load(file)
    return table


class Passes(NamedTuple):
    """How often the documents of each source are taken.

    All of them `whole` times; once more those whose split hash is below the limit.
    """

    whole: tuple[int, ...]
    limits: tuple[int, ...]

    @classmethod
    def once(cls, sources: int) -> Passes:
        """Everything once."""
        return cls((1,) * sources, (0,) * sources)

    @property
    def number(self) -> int:
        """The number of passes through the corpus."""
        return max(times + (limit > 0) for times, limit in zip(*self))


def chosen(table: NDArray[Any], passes: Passes, number: int) -> NDArray[np.int64]:
    """The documents of a shard that pass `number` takes, ascending."""
    whole = np.array(passes.whole)[table["source"]]
    limits = np.array(passes.limits, np.uint64)[table["source"]]
    return np.flatnonzero((whole > number) | ((whole == number) & (table["split"] < limits)))


def _slices(byte_ends: NDArray[np.uint64], batch_documents: int) -> Iterator[tuple[int, int]]:
    """Borders of batches of at most `batch_documents` documents and, but for a single one, 16 MiB."""
    first = 0
    while first < len(byte_ends):
        before = int(byte_ends[first - 1]) if first else 0
        full = int(np.searchsorted(byte_ends, np.uint64(before + BATCH_BYTES), side="right"))
        last = min(max(full, first + 1), first + batch_documents)
        yield first, last
        first = last


class Piece(NamedTuple):
    """Of the documents of one shard that one pass takes, numbers `first` ... `last`."""

    shard: Path
    number: int
    first: int
    last: int


class FilePlan(NamedTuple):
    """One token file and what it is put together from."""

    split: Split
    name: str
    passes: Passes
    pieces: tuple[Piece, ...]


def plan_files(shards: Sequence[Path], split: Split, passes: Passes, max_file_tokens: int) -> list[FilePlan]:
    """Lay the shards of a split out in files of at most `max_file_tokens` (but for a single longer document).

    A split that fits one file has the plain name `train.bin`, others are numbered.
    """
    files: list[list[Piece]] = [[]]
    used = 0
    for number in range(passes.number):
        for shard in shards:
            table = read_table(shard, split)
            ends = np.cumsum(table["tokens"][chosen(table, passes, number)], dtype=np.int64)
            first = 0
            while first < len(ends):
                before = int(ends[first - 1]) if first else 0
                last = int(np.searchsorted(ends, before + max_file_tokens - used, side="right"))
                if last == first and not files[-1]:
                    last = first + 1
                if last > first:
                    files[-1].append(Piece(shard, number, first, last))
                    used += int(ends[last - 1]) - before
                    first = last
                if first < len(ends):
                    files.append([])
                    used = 0
    names = [f"{split}.bin"] if len(files) == 1 else [f"{split}_{number:04d}.bin" for number in range(len(files))]
    return [FilePlan(split, name, passes, tuple(pieces)) for name, pieces in zip(names, files)]


def assemble(plan: FilePlan, folder: Path, itemsize: int, advance: Callable[[int], None]) -> TokenFile:
    """Write one `.bin`, its `.index` and, of several sources, its `.sources` into `folder`, hashing as it goes."""
    digest = hashlib.sha256()
    lengths, origins = [np.empty(0, np.int64)], [np.empty(0, SOURCE_DTYPE)]
    size = 0
    with atomic_write(folder / plan.name) as output:
        for piece in plan.pieces:
            table = read_table(piece.shard, plan.split)
            documents = chosen(table, plan.passes, piece.number)[piece.first : piece.last]
            ends = np.cumsum(table["tokens"], dtype=np.int64)
            with (piece.shard / f"{plan.split}.bin").open("rb") as tokens:
                for run in np.split(documents, np.flatnonzero(np.diff(documents) > 1) + 1):
                    start = int(ends[run[0]]) - int(table["tokens"][run[0]])
                    count = int(ends[run[-1]]) - start
                    _copy(tokens, start * itemsize, count * itemsize, output.write, digest.update)
            lengths.append(table["tokens"][documents].astype(np.int64))
            origins.append(table["source"][documents])
            size += int(table["bytes"][documents].sum())
            advance(len(documents))
    ends_in_file = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    index = ends_in_file.astype(INDEX_DTYPE).tobytes()
    with atomic_write((folder / plan.name).with_suffix(".index")) as output:
        output.write(index)
    sources = np.concatenate(origins).astype(SOURCE_DTYPE).tobytes() if len(plan.passes.whole) > 1 else None
    if sources is not None:
        with atomic_write((folder / plan.name).with_suffix(".sources")) as output:
            output.write(sources)
    return TokenFile(
        name=plan.name,
        tokens=int(ends_in_file[-1]) if len(ends_in_file) else 0,
        documents=len(ends_in_file),
        bytes=size,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        sources_sha256=None if sources is None else hashlib.sha256(sources).hexdigest(),
    )


def _copy(file: IO[bytes], start: int, count: int, *sinks: Callable[[bytes], Any]) -> None:
    file.seek(start)
    while count:
        block = file.read(min(count, COPY_BYTES))
        assert block, f"{file.name} ends early"
        for sink in sinks:
            sink(block)
        count -= len(block)
