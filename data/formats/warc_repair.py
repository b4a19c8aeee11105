"""Finding the way in a damaged WARC file: is the record at a place whole, and where does the next one begin?

This reads byte by byte what the archive reader passes over, so it is for places where that one gave up.
"""

from __future__ import annotations

import re
import zlib
from typing import IO, NamedTuple

from data.formats.streams import BrokenStream, chunks

BLOCK = 1 << 20
HEAD_BYTES = 1 << 16
GZIP = b"\x1f\x8b\x08"
START = b"WARC/1."
END = b"\r\n\r\n"
PADDING = b"\r\n\0"


class Damage(NamedTuple):
    """Where something begins that is no whole record, and why: `truncated` or `broken-record`."""

    start: int
    reason: str


def find_damage(file: IO[bytes], position: int, packed: bool, read: bool) -> Damage | None:
    """What stopped the reading of records that came last to the one at byte `position`, or None at the file's end.

    `packed` files hold each record as a gzip member of its own, as the standard advises (ISO 28500, annex D); of others
    it can only be told that they are damaged. `read` says that the record itself came out well.
    """
    size = file.seek(0, 2)
    if read and packed and not begins_record(file, position, packed):
        return _damaged_member(file, size)
    end = _record_end(file, position, packed)
    if isinstance(end, str):
        return Damage(position, end)
    file.seek(end)
    if size - end < HEAD_BYTES and not file.read().strip(PADDING):
        return None
    state = _record_end(file, end, packed)
    return Damage(end, state if isinstance(state, str) else "broken-record")


def _damaged_member(file: IO[bytes], size: int) -> Damage | None:
    file.seek(0)
    try:
        for _ in chunks(file, ".gz"):
            pass
    except BrokenStream as error:
        return Damage(size, error.reason)
    return None


def _record_end(file: IO[bytes], start: int, packed: bool) -> int | str:
    """Where the record that begins at byte `start` ends, or what is wrong with it."""
    head, ended, _ = read_head(file, start, packed).partition(END)
    found = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*(?:\r\n|$)", head, re.IGNORECASE)
    if not head.startswith(START) or not ended or found is None:
        return "truncated" if _is_cut(file, start, head) else "broken-record"
    length = len(head) + len(END) + int(found[1]) + len(END)
    if packed:
        return _member_end(file, start, length)
    if file.seek(0, 2) < start + length - len(END):
        return "truncated"
    file.seek(start + length - len(END))
    return start + length if file.read(len(END)) == END else "broken-record"


def next_record(file: IO[bytes], start: int, packed: bool) -> int | None:
    """The first byte, at `start` or later, where a record begins; None where there is no more."""
    mark = GZIP if packed else b"\n" + START
    file.seek(start)
    carried = b""
    while block := file.read(BLOCK):
        block = carried + block
        base = file.tell() - len(block)
        at = block.find(mark)
        while at >= 0:
            position = base + at + (0 if packed else 1)
            if begins_record(file, position, packed):
                return position
            at = block.find(mark, at + 1)
        carried = block[-(len(mark) - 1) :]
        file.seek(base + len(block))
    return None


def begins_record(file: IO[bytes], position: int, packed: bool) -> bool:
    """Whether what stands at `position` reads as the beginning of a record."""
    return read_head(file, position, packed, 512).startswith(START)


def read_head(file: IO[bytes], start: int, packed: bool, size: int = HEAD_BYTES) -> bytes:
    """Up to `size` bytes at `start`, unpacked; a NUL where that cannot be done."""
    file.seek(start)
    data = file.read(size)
    if not packed:
        return data
    try:
        return zlib.decompressobj(31).decompress(data, size)
    except zlib.error:
        return b"\0"


def _is_cut(file: IO[bytes], start: int, head: bytes) -> bool:
    """Whether the file ends in the middle of a record's head."""
    return file.seek(0, 2) - start < HEAD_BYTES and END not in head and head[: len(START)] == START[: len(head)]


def _member_end(file: IO[bytes], start: int, length: int) -> int | str:
    """Where the gzip member at `start` ends, if `length` bytes are in it."""
    file.seek(start)
    inflate = zlib.decompressobj(31)
    size = 0
    position = start
    try:
        while not inflate.eof:
            block = file.read(1 << 16)
            if not block:
                return "truncated"
            position += len(block)
            while block and not inflate.eof:
                size += len(inflate.decompress(block, BLOCK))
                block = inflate.unconsumed_tail
    except zlib.error:
        return "broken-record"
    return position - len(inflate.unused_data) if size == length else "broken-record"
