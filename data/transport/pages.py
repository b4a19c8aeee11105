"""Small files that say what there is: read into memory, tried again where that helps."""

from __future__ import annotations

import tenacity

from data.transport.clients import client_for
from data.transport.retry import FetchError, Passing, check_status, network, waiting_time

TRIES = 5


def read_page(url: str, first_wait: float = 1.0) -> bytes | None:
    """What stands at `url`, or None where there is nothing (403 and 404). Raises `FetchError`."""

    def ask() -> bytes:
        with network():
            response = client_for(url).get(url)
        check_status(response)
        return response.content

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
    except FetchError as error:
        if error.status in (403, 404):
            return None
        raise
