"""Where the server listens. Imports nothing heavy, so that a taken port or an open door is refused at once."""

from __future__ import annotations

import ipaddress
import socket

from config.errors import UserError

BACKLOG = 2048  # connections that the system holds while the event loop is busy


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send at once; port 0 takes a free one. `UserError` where that can't be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UserError(f"Can't listen on {host}, port {port}: {error}. Choose another with --port.") from error
    # Connections inherit it. Else a chunk waits until the client has acknowledged the one before, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address_of(listener: socket.socket) -> str:
    """The address of the page, for a person to click."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
