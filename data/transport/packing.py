"""The bytes of a file itself, where a server names a packing (`Content-Encoding`) although none was asked for.

With `a.jsonl.gz` that packing is mostly the file's own, named once more, and its bytes are those that come. It may also
have been put on top of that, or on a file that is not packed; then it is taken off. The first bytes tell.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain

import httpx

from data.formats.streams import BrokenStream, chunks
from data.transport.retry import FetchError, Passing

LOOK = 4096
"""Bytes at the beginning of a file by which it is judged."""
PACKINGS = {"gzip": (".gz", b"\x1f\x8b"), "x-gzip": (".gz", b"\x1f\x8b"), "zstd": (".zst", b"\x28\xb5\x2f\xfd")}


def packing_of(response: httpx.Response) -> str | None:
    """The packing that the server names, if any."""
    named = response.headers.get("Content-Encoding", "").strip().lower()
    return None if named in ("", "identity") else named


def is_own(packing: str, url: str, head: bytes) -> bool:
    """Whether an answer that begins with `head` is the file at `url` as it is; raises `FetchError` if none can tell."""
    if packing not in PACKINGS:
        raise FetchError(f"{url} is sent packed as {packing}, which cannot be unpacked. Fetch it from another address.")
    suffix, mark = PACKINGS[packing]
    if not head.startswith(mark):
        return True
    return httpx.URL(url).path.lower().endswith(suffix) and not _beginning(packing, head).startswith(mark)


def own_content(response: httpx.Response, url: str) -> tuple[Iterator[bytes], bool]:
    """The content of an answer from its first byte on, unpacked if need be, and whether that was needed.

    What cannot be unpacked raises `Passing` where it is met, and so does an end that comes too early.
    """
    packing = packing_of(response)
    content: Iterator[bytes] = response.iter_raw()
    if packing is None:
        return content, False
    head = b""
    while len(head) < LOOK and (chunk := next(content, None)) is not None:
        head += chunk
    content = chain([head], content)
    own = is_own(packing, url, head)
    return content if own else _unpacked(packing, content), not own


def _beginning(packing: str, head: bytes) -> bytes:
    try:
        return next(_unpacked(packing, iter([head])), b"")
    except Passing:
        return b""


def _unpacked(packing: str, content: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks(io.BufferedReader(_Pieces(content)), PACKINGS[packing][0])
    except BrokenStream as error:
        cut = error.reason == "truncated"
        raise Passing("the connection was cut" if cut else "it cannot be unpacked", damaged=not cut) from error


class _Pieces(io.RawIOBase):
    """Pieces as a file that is read from its beginning."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as one piece goes."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        length = min(len(target), len(self._rest))
        target[:length] = self._rest[:length]
        self._rest = self._rest[length:]
        return length
