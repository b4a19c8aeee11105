"""Running the application: a socket, a uvicorn server, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from config.errors import UserError
from inference.server.logs import FIELD
from inference.server.service import Service

log = logging.getLogger("quern.server")

BACKLOG = 2048  # connections that the system holds while the event loop is busy
AFTER_GRACE = 5.0  # seconds that answers have to say that they were cut short


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. `UserError` where that can't be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"Can't listen on {host}, port {port}: {error}. Choose another with --port.") from error


def address_of(listener: socket.socket) -> str:
    """The address of the page, for a person to click."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def serve_until_signal(app: FastAPI, service: Service, listener: socket.socket, grace: float) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what has begun, for up to `grace` seconds."""
    config = uvicorn.Config(
        app,
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
