"""Asking for a file's size and state without fetching it."""

from __future__ import annotations

import threading

import httpx

from data.transport.packing import LOOK, own_content, packing_of
from data.transport.retry import FEW_TRIES, ask_again, check_status, network, strong_etag, total_size
from data.transport.slots import connection


def probe(
    client: httpx.Client, url: str, connections: int, stop: threading.Event | None = None, first_wait: float = 1.0
) -> tuple[int | None, str | None]:
    """Size in bytes and strong ETag of the file at `url`, each None where the server does not tell.

    The first byte is asked for, since some servers answer nothing but GET. Raises `FetchError`.
    """

    def ask(last: int = 0) -> tuple[int | None, str | None]:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes=0-{last}"}
        with (
            network(),
            connection(url, connections, stop),
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != 416:
                check_status(response)
            if packing_of(response) is None:
                return total_size(response), strong_etag(response)
            if response.status_code == 200 or last:
                _, unpacked = own_content(response, url)
                return None if unpacked else total_size(response), strong_etag(response)
        return ask(LOOK - 1)

    return ask_again(ask, url, FEW_TRIES, first_wait)
