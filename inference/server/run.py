"""Running the application: a uvicorn server, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from inference.server.addresses import BACKLOG
from inference.server.logs import FIELD
from inference.server.service import Service

log = logging.getLogger("quern.server")

SWITCH_INTERVAL = 0.0005  # seconds after which a thread that executes Python lets another do so; Python's own is 5 ms
AFTER_GRACE = 5.0  # seconds that answers have to say that they were cut short


def serve_until_signal(
    app: FastAPI, service: Service, listener: socket.socket, grace: float, protocol: type[asyncio.Protocol]
) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what has begun, for up to `grace` seconds.

    `protocol` is that of the connections.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        lifespan="on",
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(grace + AFTER_GRACE) + 1,
        proxy_headers=False,
    )
    _Server(config, service, grace).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server, which ends a process as its signal would; this one returns, as it has done what was asked."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, let what runs finish, and end the rest with an error that says why."""
        self._service.refuse()
        log.info("stopping", extra={FIELD: {"running": self._service.running, "waiting": self._service.waiting}})
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.fail_all)
        await super().shutdown(sockets)
        timer.cancel()
        log.info("stopped")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Let signals end the server; a second Ctrl-C ends it at once."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
