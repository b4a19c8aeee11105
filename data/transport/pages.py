"""Small files that say what there is: read into memory, tried again where that helps."""

from __future__ import annotations

from data.transport.clients import client_for
from data.transport.retry import FEW_TRIES, FetchError, ask_again, check_status, network


def read_page(url: str, first_wait: float = 1.0) -> bytes | None:
    """What stands at `url`, or None where there is nothing (403 and 404). Raises `FetchError`."""

    def ask() -> bytes:
        with network():
            response = client_for(url).get(url)
        check_status(response)
        return response.content

    try:
        return ask_again(ask, url, FEW_TRIES, first_wait)
    except FetchError as error:
        if error.status in (403, 404):
            return None
        raise
