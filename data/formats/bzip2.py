"""Bzip2 files of many streams, read from anywhere: a stream is known by the ten bytes that it begins with."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from typing import IO

from data.formats.streams import CHUNK, BrokenStream

# The head of a stream, then that of its first block, or of its end where it is empty.
BEGINNING = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
BEGINNING_BYTES = 10
PIECE = 1 << 20

Piece = tuple[bytes, bool]


def stream_pieces(file: IO[bytes], start: int, end: int) -> Iterator[Piece | BrokenStream]:
    """The content of the streams that begin at byte `start` or later, in pieces of at most 1 MiB, to the file's end.

    Each piece tells whether its stream begins before `end`. In place of what cannot be unpacked stands a
    `BrokenStream`, behind which the next stream follows; if that is a stream of others, a piece of theirs comes first.
    Nothing comes where no stream begins before `end`.
    """
    size = file.seek(0, 2)
    position = next_stream(file, start, end)
    if start == 0 and position != 0:
        yield BrokenStream("corrupt" if size else "truncated")
    while position is not None and position < size:
        own = position < end
        finish: int | None = None
        try:
            for output, finish in _unpack(file, position):
                if output:
                    yield output, own
        except BrokenStream as broken:
            if not own:
                yield b"", False
            yield broken
            if broken.reason == "truncated":
                return
        after = position + 1 if finish is None else finish
        position = next_stream(file, after, size)
        if finish is not None and position != finish and finish < size:
            yield BrokenStream("corrupt")


def next_stream(file: IO[bytes], start: int, end: int) -> int | None:
    """The first byte from `start` to before `end` where a stream begins."""
    file.seek(start)
    carried = b""
    while start < end and (block := file.read(CHUNK)):
        block = carried + block
        found = BEGINNING.search(block)
        if found is not None:
            position = start + found.start()
            return position if position < end else None
        carried = block[1 - BEGINNING_BYTES :]
        start += len(block) - len(carried)
    return None


def _unpack(file: IO[bytes], position: int) -> Iterator[tuple[bytes, int | None]]:
    """The content of the stream at byte `position`; the last piece with where the stream ends."""
    file.seek(position)
    decompressor = bz2.BZ2Decompressor()
    while data := file.read(CHUNK):
        position += len(data)
        try:
            output = decompressor.decompress(data, PIECE)
            while not decompressor.eof and not decompressor.needs_input:
                yield output, None
                output = decompressor.decompress(b"", PIECE)
        except OSError as error:
            raise BrokenStream("corrupt") from error
        if decompressor.eof:
            yield output, position - len(decompressor.unused_data)
            return
        yield output, None
    raise BrokenStream("truncated")
