"""Connections as the server grants them: so many at once, and so long for a request to begin."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED = 100  # files that are no connections
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def connections(header_timeout: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol, which by itself waits for the headers of a request for ever.

    A connection is closed where these are not complete `header_timeout` seconds after it was made, or after their first
    byte when it has answered before. Beyond `most` connections, or what files the system allows, further ones get 503.
    """
    most = min(most, _allowed_files() - RESERVED)

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(FULL)
                transport.close()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout, self.transport.close)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection


def _allowed_files() -> int:
    """How many files this process may have open, which becomes as many as the system lets it have."""
    try:
        import resource
    except ImportError:  # Windows
        return 8192
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # a system that has a limit besides
        return _count(soft)
    return _count(hard)


def _count(limit: int) -> int:
    return 2**31 if limit < 0 else limit
