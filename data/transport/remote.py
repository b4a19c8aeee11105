"""A file on a server, read where one likes without keeping it: what Parquet and decompressors need of a file."""

from __future__ import annotations

import io

import httpx
import tenacity

from config.errors import UserError
from data.transport.retry import FRUITLESS_TRIES, FetchError, Passing, check_status, network, strong_etag, waiting_time

FIRST_READ = 256 << 10
LONGEST_READ = 8 << 20


class RemoteStream(io.RawIOBase):
    """A readable and seekable binary file over HTTP ranges, one of them in memory.

    A range is at least 256 KiB, and twice as long each time that reading goes straight on, up to 8 MiB.
    Errors that pass are tried again as `data.fetch` does; others, and a file that changes meanwhile, raise `UserError`.
    """

    def __init__(self, client: httpx.Client, url: str, size: int, first_wait: float = 1.0) -> None:
        self._client = client
        self._url = url
        self._size = size
        self._first_wait = first_wait
        self._position = 0
        self._start = 0
        self._ahead = FIRST_READ // 2
        self._buffer = b""
        self._etag: str | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position of the next read, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the beginning, the position or the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as the range in memory goes, or else the file."""
        if self._position >= self._size or not target:
            return 0
        end = self._start + len(self._buffer)
        if not self._start <= self._position < end:
            self._ahead = min(2 * self._ahead, LONGEST_READ) if self._position == end else FIRST_READ
            length = max(len(target), self._ahead)
            self._load(self._position, min(self._position + length, self._size))
        offset = self._position - self._start
        data = self._buffer[offset : offset + len(target)]
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self, start: int, end: int) -> None:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            wait=lambda state: waiting_time(state, state.attempt_number, self._first_wait),
            stop=tenacity.stop_after_attempt(FRUITLESS_TRIES),
            reraise=True,
        )
        try:
            self._buffer = retrying(self._request, start, end)
        except Passing as error:
            raise FetchError(f"{self._url} could not be read: {error}. Try again later.", error.status) from error
        self._start = start

    def _request(self, start: int, end: int) -> bytes:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        with network(), self._client.stream("GET", self._url, headers=headers) as response:
            check_status(response)
            if response.status_code == 200 and end - start < self._size:
                raise FetchError(f"{self._url}: the server cannot send parts of a file. Set streaming: false.")
            content = response.read()
        etag = strong_etag(response)
        if self._etag is not None and etag is not None and etag != self._etag:
            raise UserError(f"{self._url} changed while it was read. Start again.")
        self._etag = etag
        if len(content) != end - start:
            raise Passing(f"{len(content)} bytes came instead of {end - start}")
        return content
