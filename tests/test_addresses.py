"""The socket that a server listens on."""

from __future__ import annotations

import socket

from inference.server.addresses import listen


def test_what_a_connection_sends_is_not_held_back() -> None:
    """By Nagle's algorithm, which would let every chunk of a stream wait for the one before."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
