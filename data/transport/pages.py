"""Small files that say what there is: read into memory, tried again where that helps."""

from __future__ import annotations

from data.transport.clients import client_for
from data.transport.packing import own_content
from data.transport.retry import FEW_TRIES, FetchError, ask_again, check_status, network
from data.transport.slots import connection


def read_page(url: str, connections: int, first_wait: float = 1.0) -> bytes | None:
    """What stands at `url`, or None where there is nothing (403 and 404). Raises `FetchError`."""

    def ask() -> bytes:
        headers = {"Accept-Encoding": "identity"}
        with (
            network(),
            connection(url, connections),
            client_for(url).stream("GET", url, headers=headers) as response,
        ):
            check_status(response)
            return b"".join(own_content(response, url)[0])

    try:
        return ask_again(ask, url, FEW_TRIES, first_wait)
    except FetchError as error:
        if error.status in (403, 404):
            return None
        raise
