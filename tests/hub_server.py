"""A server on loopback that speaks the part of the hub's protocol that a download uses, and misbehaves when told to.

Repositories answer under 127.0.0.1. Files in large-file storage are redirected to the same port under `localhost`,
which is another origin, as the storage of the hub is.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclass
class Repo:
    """One data set; `branches` maps a revision to its files."""

    branches: dict[str, dict[str, bytes]]
    card: dict[str, Any] = field(default_factory=dict)
    large: Callable[[str], bool] = lambda path: path.endswith((".parquet", ".zst", ".gz"))
    needs_token: str | None = None
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        for branch, files in self.branches.items():
            state = json.dumps([branch, {path: hashlib.sha1(body).hexdigest() for path, body in files.items()}])
            commit = hashlib.sha1(state.encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, commit: str) -> dict[str, bytes]:
        """The files at a commit."""
        return next(files for branch, files in self.branches.items() if self.commit(branch) == commit)


@dataclass
class Answer:
    """What the server does instead of answering a request for a file well, once.

    `status` with `headers` refuses; `cut_after` closes the connection after so many bytes of body, `pause_after` waits
    there for `HubServer.resume`; `body` replaces the content; `etag` replaces the ETag. With `whole` it is kept for
    a request that does not ask for a range.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    pause_after: int | None = None
    body: bytes | None = None
    etag: str | None = None
    ignore_range: bool = False
    whole: bool = False


@dataclass
class Request:
    """One request that came in, and how many bytes of body were sent for it."""

    path: str
    host: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0

    @property
    def range_start(self) -> int:
        """First byte asked for."""
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])


class HubServer:
    """The server; a context manager. Set `HF_ENDPOINT` to its `endpoint`. `static` files answer by their path alone.

    `packings` are named as `Content-Encoding` with files by their path; `delay` is how many seconds the content of a
    file takes; `busiest` is the most of them that were under way at once.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.static: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.misbehave: dict[str, list[Answer]] = defaultdict(list)
        self.paused = threading.Event()
        self.resume = threading.Event()
        self.page = 2
        self.packings: dict[str, str] = {}
        self.delay = 0.0
        self.busiest = 0
        self._busy = 0
        self._counting = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer that is under way."""
        with self._counting:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        time.sleep(self.delay)
        try:
            yield
        finally:
            with self._counting:
                self._busy -= 1

    def bodies(self, path: str) -> list[Request]:
        """Requests that were answered with content of the file, in order."""
        return [request for request in self.requests if request.path.endswith(path) and request.status in (200, 206)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle are what the tests are about."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        """Answer what the hub's file system asks: which of some paths are there."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        parts = urlsplit(self.path).path.removeprefix("/api/datasets/").split("/")
        repo = self.server_state.repos[f"{parts[0]}/{parts[1]}"]
        files = repo.files(repo.commit(unquote(parts[3])) or "")
        entries = [_entry(path, files[path], repo.large(path)) for path in form["paths"] if path in files]
        self._json(Request(self.path, "", {}), entries)

    def do_HEAD(self) -> None:
        """Answer as GET does; the body is left out."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer one request."""
        split = urlsplit(self.path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(unquote(split.path), headers.get("host", ""), headers)
        self.server_state.requests.append(request)
        parts = request.path.strip("/").split("/")
        if (file := self.server_state.static.get(request.path)) is not None:
            with self.server_state.answering():
                self._content(request, request.path, file, f'"{hashlib.sha1(file).hexdigest()}"')
            return
        if parts[0] == "storage":
            self._storage(request, parts[1], "/".join(parts[2:]))
            return
        raw = split.path.removeprefix("/api").removeprefix("/datasets/").removeprefix("/models/").strip("/").split("/")
        raw += ["revision", "main"] if split.path.startswith("/api/") and len(raw) == 2 else []
        if len(raw) < 4:
            self._error(request, 404, "", "no such page")
            return
        name, action, revision = f"{raw[0]}/{raw[1]}", raw[2], unquote(raw[3])
        repo = self._allowed(request, name)
        if repo is None:
            return
        if self._misbehaves_by_status(request, f"{action}:{name}"):
            return
        commit = repo.commit(revision)
        if commit is None:
            self._error(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "revision":
            body = {
                "id": name,
                "sha": commit,
                "private": False,
                "gated": repo.gated,
                "cardData": repo.card,
                "siblings": [{"rfilename": path} for path in repo.files(commit)],
            }
            self._json(request, body)
        elif action == "tree":
            self._tree(request, repo, name, commit, parse_qs(split.query))
        else:
            self._resolve(request, repo, commit, unquote("/".join(raw[4:])))

    def _allowed(self, request: Request, name: str) -> Repo | None:
        repo = self.server_state.repos.get(name)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.needs_token and not repo.gated and token != repo.needs_token):
            self._error(request, 404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and token != repo.needs_token and not request.path.startswith("/api/"):
            self._error(request, 403 if token else 401, "GatedRepo", "Access to dataset is restricted")
            return None
        return repo

    def _tree(self, request: Request, repo: Repo, name: str, commit: str, query: dict[str, list[str]]) -> None:
        entries = [_entry(path, body, repo.large(path)) for path, body in sorted(repo.files(commit).items())]
        folders = {path.rpartition("/")[0] for path in repo.files(commit) if "/" in path}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.server_state.page
        headers = {}
        if end < len(entries):
            kind = request.path.split("/")[2]
            path = f"/api/{kind}/{name}/tree/{quote(commit)}?recursive=True&cursor={end}"
            headers["Link"] = f'<{self.server_state.endpoint}{path}>; rel="next"'
        self._json(request, entries[start:end], headers)

    def _resolve(self, request: Request, repo: Repo, commit: str, path: str) -> None:
        body = repo.files(commit).get(path)
        if body is None:
            self._error(request, 404, "EntryNotFound", "Entry not found")
        elif repo.large(path):
            if self._misbehaves_by_status(request, path):
                return
            digest = hashlib.sha256(body).hexdigest()
            self._head(
                request,
                302,
                {
                    "Location": f"http://localhost:{self.server_state.port}/storage/{digest}/{quote(path)}?signature=x",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(body)),
                    "Content-Length": "0",
                },
            )
        else:
            self._content(request, path, body, f'"{hashlib.sha1(body).hexdigest()}"', {"X-Repo-Commit": commit})

    def _storage(self, request: Request, digest: str, path: str) -> None:
        for repo in self.server_state.repos.values():
            for files in repo.branches.values():
                body = files.get(path, b"")
                if hashlib.sha256(body).hexdigest() == digest:
                    self._content(request, path, body, f'"{digest}"')
                    return
        self._error(request, 404, "EntryNotFound", "gone")

    def _misbehaves_by_status(self, request: Request, key: str) -> bool:
        queue = self.server_state.misbehave[key]
        if not queue or queue[0].status is None:
            return False
        answer = queue.pop(0)
        assert answer.status is not None
        self._head(request, answer.status, {"Content-Length": "0", **answer.headers})
        return True

    def _content(self, request: Request, path: str, body: bytes, etag: str, more: dict[str, str] | None = None) -> None:
        if self._misbehaves_by_status(request, path):
            return
        queue = self.server_state.misbehave[path]
        answer = queue.pop(0) if queue and not (queue[0].whole and "range" in request.headers) else Answer()
        body = answer.body if answer.body is not None else body
        etag = answer.etag or etag
        start, end = 0, len(body)
        packing = {"Content-Encoding": self.server_state.packings[path]} if path in self.server_state.packings else {}
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **(more or {}), **packing, **answer.headers}
        asked = request.headers.get("range")
        if asked and request.headers.get("if-range", etag) == etag and not answer.ignore_range:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(int(last) + 1, end) if last else end
            if start >= len(body):
                self._head(request, 416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        self._head(request, 206 if "Content-Range" in headers else 200, {**headers, "Content-Length": str(end - start)})
        self._send(request, body[start:end], answer)

    def _send(self, request: Request, body: bytes, answer: Answer) -> None:
        if self.command == "HEAD":
            return
        stop = answer.cut_after if answer.cut_after is not None else answer.pause_after
        first = body if stop is None else body[:stop]
        request.sent += len(first)  # before a client can have them, and look here
        try:
            self.wfile.write(first)
            self.wfile.flush()
            if answer.cut_after is not None:
                self.close_connection = True
            elif stop is not None:
                self.server_state.paused.set()
                self.server_state.resume.wait(60)
                request.sent += len(body) - stop
                self.wfile.write(body[stop:])
        except OSError:
            self.close_connection = True

    def _json(self, request: Request, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        head = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        self._head(request, 200, head)
        self.wfile.write(data)

    def _error(self, request: Request, status: int, code: str, message: str) -> None:
        self._head(request, status, {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"})

    def _head(self, request: Request, status: int, headers: dict[str, str]) -> None:
        request.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _entry(path: str, body: bytes, large: bool) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": blob}
    if large:
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry
