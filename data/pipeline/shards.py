"""Shards: the tokens of one key range, and their assembly into token files.

A shard holds for each split the flat tokens (`train.bin`) and, for every document, where its tokens and its UTF-8 bytes
end (`train.npy`, uint64 of shape (documents, 2)). Shards in the order of their ranges are the corpus in its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.files import atomic_write
from data.pipeline.batches import BATCH_BYTES
from data.tokenization.protocol import Tokenizer
from data.tokens import INDEX_DTYPE, Split, TokenFile

COPY_BYTES = 4 << 20


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


def write_shard(
    folder: Path,
    split: Split,
    frame: pl.DataFrame,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    batch_documents: int,
    advance: Callable[[int], None],
) -> None:
    """Tokenize the column `text` batch by batch into the shard in `folder`; `advance` gets the documents done."""
    ends = np.zeros((len(frame), 2), np.uint64)
    ends[:, 1] = frame["text"].str.len_bytes().cast(pl.UInt64).cum_sum().to_numpy()
    done = tokens_so_far = 0
    with atomic_write(folder / f"{split}.bin") as file:
        for first, last in _slices(ends[:, 1], batch_documents):
            tokens, batch_ends = encode_documents(frame["text"][first:last].to_list(), tokenizer, dtype)
            file.write(tokens.astype(dtype.newbyteorder("<"), copy=False).data)
            ends[first:last, 0] = batch_ends + tokens_so_far
            tokens_so_far += len(tokens)
            advance(last - done)
            done = last
    with atomic_write(folder / f"{split}.npy") as file:
        np.save(file, ends)


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
    """Documents `first` ... `last` of one shard."""

    shard: Path
    first: int
    last: int


class FilePlan(NamedTuple):
    """One token file and what it is put together from."""

    split: Split
    name: str
    pieces: tuple[Piece, ...]


def plan_files(shards: Sequence[Path], split: Split, max_file_tokens: int) -> list[FilePlan]:
    """Lay the shards of a split out in files of at most `max_file_tokens` (but for a single longer document).

    A split that fits one file has the plain name `train.bin`, others are numbered.
    """
    files: list[list[Piece]] = [[]]
    used = 0
    for shard in shards:
        ends = np.load(shard / f"{split}.npy")[:, 0].astype(np.int64)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + max_file_tokens - used, side="right"))
            if last == first and not files[-1]:
                last = first + 1
            if last > first:
                files[-1].append(Piece(shard, first, last))
                used += int(ends[last - 1]) - before
                first = last
            if first < len(ends):
                files.append([])
                used = 0
    names = [f"{split}.bin"] if len(files) == 1 else [f"{split}_{number:04d}.bin" for number in range(len(files))]
    return [FilePlan(split, name, tuple(pieces)) for name, pieces in zip(names, files)]


def assemble(plan: FilePlan, folder: Path, itemsize: int, advance: Callable[[int], None]) -> TokenFile:
    """Write one `.bin` and its `.index` into `folder`, hashing as it goes."""
    digest = hashlib.sha256()
    ends_in_file = []
    tokens = size = 0
    with atomic_write(folder / plan.name) as output:
        for piece in plan.pieces:
            ends = np.load(piece.shard / f"{plan.split}.npy").astype(np.int64)
            before = ends[piece.first - 1] if piece.first else np.zeros(2, np.int64)
            ends = ends[piece.first : piece.last] - before
            _copy(
                piece.shard / f"{plan.split}.bin",
                int(before[0]) * itemsize,
                int(ends[-1, 0]) * itemsize,
                output.write,
                digest.update,
            )
            ends_in_file.append(ends[:, 0] + tokens)
            tokens += int(ends[-1, 0])
            size += int(ends[-1, 1])
            advance(piece.last - piece.first)
    index = np.concatenate([np.empty(0, np.int64), *ends_in_file]).astype(INDEX_DTYPE).tobytes()
    with atomic_write((folder / plan.name).with_suffix(".index")) as output:
        output.write(index)
    return TokenFile(
        name=plan.name,
        tokens=tokens,
        documents=len(index) // INDEX_DTYPE.itemsize,
        bytes=size,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _copy(path: Path, start: int, count: int, *sinks: Callable[[bytes], Any]) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        while count:
            block = file.read(min(count, COPY_BYTES))
            assert block, f"{path} ends early"
            for sink in sinks:
                sink(block)
            count -= len(block)
