"""A file on a server, read where one likes without keeping it: what Parquet and decompressors need of a file."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import httpx

from config.errors import UserError
from data.transport.packing import LOOK, is_own, packing_of
from data.transport.retry import (
    FRUITLESS_TRIES,
    FetchError,
    Passing,
    ask_again,
    check_status,
    network,
    strong_etag,
    total_size,
)
from data.transport.slots import CONNECTIONS, connection
from data.transport.window import WindowedFile

FIRST_READ = 256 << 10
LONGEST_READ = 8 << 20
Range = tuple[int, int]

LIST_ANEW = "Type: python data/download_datasets.py NAME data.streaming=true --force, with the name of its source."


class RemoteStream(WindowedFile):
    """A readable and seekable binary file over HTTP ranges, one of them in memory and the next one on its way.

    A range is at least 256 KiB, and twice as long each time that reading goes straight on, up to 8 MiB; then the one
    after it is asked for while this one is read. There is never more than one request at a time, and never more than
    `connections` of all streams and fetches of this machine to the same host.
    Errors that pass are tried again as `data.fetch` does. Others raise `FetchError`, and a file that is not, or no
    longer, of this `size` and `etag` raises `UserError`; either may be None, and is then what the first answer says.
    """

    def __init__(
        self,
        client: httpx.Client,
        url: str,
        size: int | None = None,
        etag: str | None = None,
        connections: int = CONNECTIONS,
        first_wait: float = 1.0,
    ) -> None:
        super().__init__()
        self._client = client
        self._url = url
        self._size = size
        self._etag = etag
        self._connections = connections
        self._closing = threading.Event()
        self._own = False
        self._first_wait = first_wait
        self._length = FIRST_READ
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[Range, Future[bytearray]] | None = None

    @property
    def size(self) -> int:
        """Length of the file in bytes; asks the server where nobody has told it yet."""
        if self._size is None:
            self._load(self._position)
        assert self._size is not None
        return self._size

    def _end(self) -> int:
        return self.size

    def _reach(self, wanted: int) -> bool:
        if self._size is not None and self._position >= self._size:
            return False
        self._load(self._position, wanted)
        return bool(self._window)

    def close(self) -> None:
        """Forget what is in memory, and what is on its way when it comes."""
        self._closing.set()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._next, self._window = None, None, bytearray()
        super().close()

    def _load(self, start: int, wanted: int = 0) -> None:
        """Bring the range that begins at `start` into memory, and send for the next one if reading goes straight on."""
        straight = bool(self._window) and start == self._start + len(self._window)
        self._length = min(2 * self._length, LONGEST_READ) if straight else FIRST_READ
        coming, self._next = self._next, None
        if coming is not None:
            (begin, end), future = coming
            if begin == start:
                self._start, self._window = start, future.result()
                self._send_for(end)
                return
            future.cancel() or future.exception()  # one request at a time
        self._start, self._window = start, self._get(self._range(start, wanted))
        if straight:
            self._send_for(start + len(self._window))

    def _range(self, start: int, wanted: int = 0) -> Range:
        end = start + max(wanted, self._length)
        return start, end if self._size is None else min(end, self._size)

    def _send_for(self, start: int) -> None:
        if self._size is None or start >= self._size:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "read-ahead")
        piece = self._range(start)
        self._next = piece, self._thread.submit(self._get, piece)

    def _get(self, piece: Range) -> bytearray:
        return ask_again(lambda: self._request(*piece), self._url, FRUITLESS_TRIES, self._first_wait)

    def _request(self, start: int, end: int) -> bytearray:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        with (
            network(),
            connection(self._url, self._connections, self._closing),
            self._client.stream("GET", self._url, headers=headers) as response,
        ):
            if response.status_code == 416:
                self._check(total_size(response), strong_etag(response))
                return bytearray()
            check_status(response)
            if response.status_code == 200:
                raise FetchError(f"{self._url}: the server cannot send parts of a file, so it cannot be streamed.")
            self._check(total_size(response), strong_etag(response))
            content = bytearray()
            for chunk in response.iter_raw():
                content += chunk
        if len(content) != min(end, self.size) - start:
            raise Passing(f"{len(content)} bytes came instead of {end - start}")
        packing = packing_of(response)
        if packing is not None and not self._own:
            self._check_own(packing, bytes(content[:LOOK] if start == 0 else self._request(0, LOOK)))
        return content

    def _check_own(self, packing: str, head: bytes) -> None:
        """Parts of what was packed on the way are no parts of the file."""
        if not is_own(packing, self._url, head):
            raise FetchError(f"{self._url} is sent packed ({packing}), so it cannot be streamed, only fetched.")
        self._own = True

    def _check(self, size: int | None, etag: str | None) -> None:
        """Note what the first answer says of the file, and hold all later ones to it."""
        same = None in (size, self._size) or size == self._size
        if not same or None not in (etag, self._etag) and etag != self._etag:
            raise UserError(f"{self._url} has changed. {LIST_ANEW}")
        if self._size is None and size is None:
            raise FetchError(f"{self._url}: the server does not say how long the file is, so it cannot be streamed.")
        self._size = size if self._size is None else self._size
        self._etag = etag if self._etag is None else self._etag
