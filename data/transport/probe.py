"""Asking for a file's size and state without fetching it."""

from __future__ import annotations

import httpx

from data.transport.retry import FEW_TRIES, ask_again, check_status, network, strong_etag, total_size


def probe(client: httpx.Client, url: str, first_wait: float = 1.0) -> tuple[int | None, str | None]:
    """Size in bytes and strong ETag of the file at `url`, each None where the server does not tell.

    The first byte is asked for, since some servers answer nothing but GET. Raises `FetchError`.
    """

    def ask() -> tuple[int | None, str | None]:
        headers = {"Accept-Encoding": "identity", "Range": "bytes=0-0"}
        with network(), client.stream("GET", url, headers=headers) as response:
            if response.status_code != 416:
                check_status(response)
            return total_size(response), strong_etag(response)

    return ask_again(ask, url, FEW_TRIES, first_wait)
