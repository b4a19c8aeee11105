"""Asking for a file's size and state without fetching it."""

from __future__ import annotations

import httpx
import tenacity

from data.transport.retry import FetchError, Passing, check_status, network, strong_etag, total_size, waiting_time

TRIES = 5


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

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Passing),
        wait=lambda state: waiting_time(state, state.attempt_number, first_wait),
        stop=tenacity.stop_after_attempt(TRIES),
        reraise=True,
    )
    try:
        return retrying(ask)
    except Passing as error:
        raise FetchError(f"{url} could not be read: {error}. Try again later.", error.status) from error
