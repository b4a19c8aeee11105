"""Plain text: one file is one document, and a very long one several, cut where a paragraph ends."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from data.formats.rows import EXCERPT, RECORD_BYTES, Fault, Row, Wanted, excerpt_of, text_fault
from data.formats.streams import BrokenStream, text_chunks


def read_text(
    file: IO[bytes], path: str, wanted: Wanted, limit: int | None, document_bytes: int
) -> Iterator[Row | Fault]:
    """The file as pieces of at most about `document_bytes` bytes, numbered from 1.

    A piece ends at the last blank line, or else at the last line end, in its second half, or else at the next line end.
    UTF-8, with or without a byte order mark, and UTF-16 or UTF-32 with one.
    """
    number = 1
    try:
        for piece in _pieces(_text(text_chunks(file, path)), document_bytes):
            if limit is not None and number > limit:
                return
            if wanted(number - 1):
                yield _row(number, piece)
            number += 1
    except (BrokenStream, _Unusable) as error:
        if wanted(number - 1):
            yield Fault(number, error.args[0])


class _Unusable(Exception):
    """The rest of the file cannot be text; its argument is the reason as a slug."""


def _row(number: int, piece: bytes) -> Row | Fault:
    if isinstance(piece, _LongLine):
        return Fault(number, "line-too-long", excerpt_of(piece))
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        start = max(error.start - 20, 0)
        return Fault(number, "invalid-utf8", f"byte {error.start}: ... {excerpt_of(piece[start : start + 60])}")
    reason = text_fault(text)
    return Fault(number, reason, excerpt_of(text)) if reason else Row(number, text)


def _text(content: Iterator[bytes]) -> Iterator[bytes]:
    """The content without its byte order mark; bytes that are no text at all end it."""
    first = next(content, b"")
    if b"\0" in first[:65536]:
        raise _Unusable("binary")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from content


class _LongLine(bytes):
    """The beginning of a line that is too long to be read."""


def _pieces(content: Iterator[bytes], size: int) -> Iterator[bytes]:
    buffer = bytearray()
    skipping = False
    for chunk in content:
        if skipping:
            _, ended, chunk = chunk.partition(b"\n")
            skipping = not ended
        buffer += chunk
        while len(buffer) > size:
            end = _cut(buffer, size)
            if end < 0:
                break
            yield bytes(buffer[:end])
            del buffer[:end]
        if len(buffer) > max(size, RECORD_BYTES):
            line = buffer.rfind(b"\n") + 1
            if line:
                yield bytes(buffer[:line])
            yield _LongLine(buffer[line : line + 4 * EXCERPT])
            buffer.clear()
            skipping = True
    if buffer:
        yield bytes(buffer)


def _cut(buffer: bytearray, size: int) -> int:
    for mark in (b"\n\n", b"\n\r\n", b"\n"):
        at = buffer.rfind(mark, size // 2, size)
        if at >= 0:
            return at + len(mark)
    at = buffer.find(b"\n", size)
    return at + 1 if at >= 0 else -1
