"""Compressed files as bounded chunks and lines, whatever is inside them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import struct
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from data.formats.rows import EXCERPT, RECORD_BYTES

CHUNK = 1 << 18
WIDE = (  # the longer marks first, since one begins like another
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
DICTIONARY = struct.pack("<I", 0x184D2A5D)
ZSTD = b"\x28\xb5\x2f\xfd"
LONGEST_DICTIONARY = 64 << 20


class BrokenStream(Exception):
    """A compressed file that ends too early (`truncated`) or cannot be decompressed (`corrupt`)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def chunks(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The content of `file`, decompressed as the suffix of `path` says, in pieces of bounded size."""
    if path.endswith(".gz"):
        return _gzip_chunks(file)
    if path.endswith(".bz2"):
        return _bzip2_chunks(file)
    if path.endswith(".zst"):
        return _zstd_chunks(file)
    return iter(lambda: file.read(CHUNK), b"")


def text_chunks(file: IO[bytes], path: str) -> Iterator[bytes]:
    """`chunks` of a file of text: UTF-16 and UTF-32 with a byte order mark come as UTF-8, without it."""
    content = chunks(file, path)
    first = b""
    while len(first) < 4 and (chunk := next(content, None)) is not None:
        first += chunk
    found = next(((mark, encoding) for mark, encoding in WIDE if first.startswith(mark)), None)
    if found is None:
        yield first
        yield from content
        return
    mark, encoding = found
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for chunk in chain([first[len(mark) :]], content):
        yield decoder.decode(chunk).encode("utf-8", "replace")


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.open(file, "rb") as content:
            while chunk := content.read1(CHUNK):  # `read` would lose what stands before a cut
                yield chunk
    except EOFError as error:
        raise BrokenStream("truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BrokenStream("corrupt") from error


def _bzip2_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """All streams of a .bz2 file, from where it stands."""
    decompressor = bz2.BZ2Decompressor()
    begun = False
    while data := file.read(CHUNK):
        while data:
            begun = True
            try:
                output = decompressor.decompress(data, CHUNK)
                while output:
                    yield output
                    output = b"" if decompressor.eof else decompressor.decompress(b"", CHUNK)
            except OSError as error:
                raise BrokenStream("corrupt") from error
            data = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor, begun = bz2.BZ2Decompressor(), False
    if begun:
        raise BrokenStream("truncated")


def _zstd_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """All frames of a .zst file, windows of up to 2 GiB (`zstd --long=31`) included.

    The library's own reader does not tell a truncated file from a whole one. Its decompression object does, but gives
    everything it can at once, so the input goes in by small steps while the output is large.

    A file may begin with the dictionary of all its frames, as those of web archives do:
    https://iipc.github.io/warc-specifications/specifications/warc-zstd/.
    """
    import zstandard

    head, dictionary = _zstd_dictionary(file)
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31, dict_data=dictionary)
    frame = None
    step = 256
    while data := head or file.read(step):
        head = b""
        while data:
            frame = frame or decompressor.decompressobj()
            try:
                output = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise BrokenStream("corrupt") from error
            step = min(step * 2, 1 << 16) if len(output) < 1 << 20 else max(step // 4, 64)
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
            if output:
                yield output
    if frame is not None:
        raise BrokenStream("truncated")


def _zstd_dictionary(file: IO[bytes]) -> tuple[bytes, Any]:
    """What was read of the frames, and the dictionary that stands before them, if any."""
    import zstandard

    head = file.read(8)
    if not head.startswith(DICTIONARY):
        return head, None
    length = int.from_bytes(head[4:], "little")
    content = file.read(min(length, LONGEST_DICTIONARY))
    if len(head) < 8 or len(content) < length:
        raise BrokenStream("truncated" if length <= LONGEST_DICTIONARY else "corrupt")
    try:
        if content.startswith(ZSTD):
            content = zstandard.ZstdDecompressor().decompress(content, max_output_size=LONGEST_DICTIONARY)
        return b"", zstandard.ZstdCompressionDict(content)
    except zstandard.ZstdError as error:
        raise BrokenStream("corrupt") from error


def bounded_lines(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines without their line feed, each with its length in bytes.

    Of a line longer than `RECORD_BYTES` only the beginning is given, so it is shorter than its length says.
    """
    line: list[bytes] = []
    length = 0
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            line.append(part)
            length += len(part)
            yield b"".join(line)[: length if length <= RECORD_BYTES else 4 * EXCERPT], length
            line, length = [], 0
        if length + len(rest) > RECORD_BYTES:
            line = [b"".join([*line, rest])[: 4 * EXCERPT]]
        elif rest:
            line.append(rest)
        length += len(rest)
    if length:
        yield b"".join(line), length
