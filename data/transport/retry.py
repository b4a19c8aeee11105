"""What HTTP requests of ours share: which failures pass, how long to wait, and how the rest is told to the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
import tenacity

from config.errors import UserError

Answer = TypeVar("Answer")

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
FRUITLESS_TRIES = 8
FEW_TRIES = 5
"""For what is small and asked for before anything is fetched."""
LONGEST_WAIT = 600.0
TIMEOUT = httpx.Timeout(60.0, connect=20.0)


class FetchError(UserError):
    """A file that could not be fetched; `status` is the HTTP status, or None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Passing(Exception):
    """A failure that may pass. `wait` is how many seconds the server wants us to stay away."""

    def __init__(
        self, reason: str, wait: float | None = None, damaged: bool = False, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.damaged = damaged
        self.status = status


def waiting_time(state: tenacity.RetryCallState, fruitless: int, first_wait: float) -> float:
    """Seconds before the next try: what the server asks for, else twice as long after each fruitless one."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Passing) and error.wait is not None:
        return min(error.wait, LONGEST_WAIT)
    return min(first_wait * 2.0 ** max(fruitless - 1, 0), 60.0)


def ask_again(ask: Callable[[], Answer], url: str, tries: int, first_wait: float) -> Answer:
    """What `ask` gives, which may raise `Passing` so many times less one; `FetchError` where it does to the end."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Passing),
        wait=lambda state: waiting_time(state, state.attempt_number, first_wait),
        stop=tenacity.stop_after_attempt(tries),
        reraise=True,
    )
    try:
        return retrying(ask)
    except Passing as error:
        raise FetchError(f"{url} could not be read: {error}. Try again later.", error.status) from error


def retry_after(headers: httpx.Headers, now: datetime | None = None) -> float | None:
    """Seconds to wait, as the server says by `Retry-After` (seconds or a date) or `RateLimit` (`...;t=55`)."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max((parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds(), 0.0)
        except (TypeError, ValueError):
            return None
    limit = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def check_status(response: httpx.Response) -> None:
    """Return for an answer with content, else raise `Passing` or `FetchError`."""
    status = response.status_code
    if status in (200, 206):
        return
    described = f"the server answered {status} {response.reason_phrase}".strip()
    if status in PASSING:
        raise Passing(described, retry_after(response.headers), status=status)
    raise FetchError(f"{response.request.url} could not be fetched: {described}.", status)


def strong_etag(response: httpx.Response) -> str | None:
    """The ETag, unless it is a weak one, which promises nothing about the bytes (RFC 9110, section 8.8.1)."""
    etag = response.headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag


@contextmanager
def network() -> Iterator[None]:
    """Turn a broken connection into `Passing`."""
    try:
        yield
    except httpx.TransportError as error:
        raise Passing(str(error) or type(error).__name__) from error
    except httpx.TooManyRedirects as error:
        raise FetchError(str(error)) from error


def total_size(response: httpx.Response) -> int | None:
    """Length of the whole file by the answer's head, in bytes, or None where that does not tell."""
    if response.status_code in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None
