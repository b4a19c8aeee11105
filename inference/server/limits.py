"""What a request must satisfy before the application sees it, and what every answer carries."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.server.errors import ApiError
from inference.server.logs import FIELD
from inference.server.metrics import Metrics

log = logging.getLogger("quern.server")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DRAINED = 16  # a body this many times too long is read to its end, so that the client sees the answer
MEASURED = ("/", "/health", "/metrics", "/openapi.json", "/v1/chat/completions", "/v1/completions", "/v1/models")
QUIET = ("/health", "/metrics")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """What the server grants a request.

    `keys` are the API keys that open /v1 and /metrics; none: they are open to all. `hosts` are the names by which the
    server may be called; None: any. `timeout` is in seconds from a request's first byte to its answer's last.
    """

    max_body: int = 2**20
    timeout: float = 600.0
    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None


class ErrorResponse(Response):
    """An `ApiError` as an answer."""

    def __init__(self, error: ApiError) -> None:
        content = json.dumps(error.body()).encode()
        super().__init__(content, error.status, error.headers, "application/json")


class Gate:
    """ASGI middleware: host, key, body, identity and log of every request."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._keys = [_digest(key) for key in limits.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send)
        scope.setdefault("state", {}).update(request_id=visit.request_id, deadline=visit.started + self._limits.timeout)
        try:
            self._check(scope["path"], visit.headers)
            if scope["method"] == "POST":
                await self._read_body(visit)
            await self._app(scope, visit.receive, visit.send)
        except ApiError as error:
            await ErrorResponse(error)(scope, receive, visit.send)
        except Exception:
            log.exception("a request failed", extra={FIELD: {"request_id": visit.request_id}})
            if visit.status is None:
                failed = ApiError(500, "The server failed. Its log says more.", "internal_error")
                await ErrorResponse(failed)(scope, receive, visit.send)
        finally:
            self._note(scope, visit)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise `ApiError` for a host by which the server may not be called, or without the key where one is needed."""
        hosts = self._limits.hosts
        host = headers.get("host", "")
        if hosts is not None and re.sub(r":\d*$", "", host).strip("[]").lower() not in hosts:
            message = f"This server does not answer to the host {host!r}. Start it with --allow-host to change that."
            raise ApiError(400, message, "host_not_allowed")
        if self._keys and (path.startswith("/v1/") or path == "/metrics"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not key.strip():
                message = "You didn't provide an API key. Send it in the header Authorization: Bearer KEY."
                raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
            given = _digest(key.strip())
            # All keys are compared, so that the time tells nothing of which one was nearly right.
            if not any([hmac.compare_digest(given, key) for key in self._keys]):
                message = "Incorrect API key provided."
                raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})

    async def _read_body(self, visit: _Visit) -> None:
        """Read the body of a POST, which must be JSON, within the limits of size and time."""
        if visit.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The header Content-Type must be application/json.", "unsupported_media_type")
        limit = self._limits.max_body
        error = ApiError(413, f"The body of the request is longer than {limit:,} bytes.", "request_too_large")
        declared = visit.headers.get("content-length", "")
        waits = "expect" in visit.headers  # a client that asks before it sends need not send
        if declared.isdigit() and int(declared) > limit and (waits or int(declared) > DRAINED * limit):
            raise error
        try:
            async with asyncio.timeout(self._limits.timeout):
                if not await visit.read(limit):
                    raise error
        except TimeoutError:
            raise ApiError(408, "The body of the request took too long to arrive.", "timeout") from None

    def _note(self, scope: Scope, visit: _Visit) -> None:
        """Count and log an answer."""
        path, seconds = scope["path"], time.monotonic() - visit.started
        endpoint = next(
            (one for one in MEASURED if path == one or (one == "/v1/models" and path.startswith(one))), "other"
        )
        status = 499 if visit.status is None else visit.status
        self._metrics.requests.labels(endpoint, str(status)).inc()
        self._metrics.request_seconds.observe(seconds)
        if visit.left:
            self._metrics.disconnects.inc()
        if path in QUIET and status == 200:
            return
        fields = {
            "request_id": visit.request_id,
            "client": (scope.get("client") or [None])[0],
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            **({"disconnected": True} if visit.left else {}),
            **scope["state"].get("log", {}),
        }
        log.info("request", extra={FIELD: fields})


class _Visit:
    """One request on its way through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = time.monotonic()
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        self.status: int | None = None
        self.left = False
        self._complete = False
        self._receive = receive
        self._send = send
        self._body: bytes | None = None

    async def read(self, limit: int) -> bool:
        """Read the body to the end, keeping `limit` bytes at most; whether that was all of it."""
        parts, size, more = [], 0, True
        while more and size <= DRAINED * limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.left = True
                raise ApiError(499, "The client left.")
            size += len(message.get("body", b""))
            if size <= limit:
                parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self._body = b"".join(parts)
        return size <= limit

    async def receive(self) -> Message:
        """The body in one, then whatever comes."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Add the headers that every answer carries."""
        if message["type"] == "http.response.start":
            self.status = None if message["status"] == 499 else message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
