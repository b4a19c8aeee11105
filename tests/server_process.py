"""A real server process on loopback, with a small random model behind it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai import OpenAI

from inference.server.service import Service
from scripts.serve import serve
from tests.workspace import Workspace, command, make_workspace

CONTEXT = 2048


@dataclass
class Server:
    """A running server; `log` are the lines that it writes to standard error."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's client, which does not try again."""
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, **{"max_retries": 0, "timeout": 60.0, **options})

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """POST a JSON body, or text as it is."""
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        return httpx.post(
            f"{self.address}{path}",
            content=content,
            headers={"content-type": "application/json", **headers},
            timeout=900,
        )

    def metric(self, name: str, **headers: str) -> float:
        """The sum of a metric over its labels."""
        page = httpx.get(f"{self.address}/metrics", headers=headers, timeout=60).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.M))

    def logged(self) -> list[dict[str, Any]]:
        """The log, each line a JSON object."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self) -> int:
        """End it as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def server_workspace(folder: Path, *overrides: str) -> Workspace:
    """A folder with a model whose context is long enough for answers that take a while."""
    return make_workspace(folder, f"model.context_length={CONTEXT}", *overrides)


@contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Run `scripts/serve.py` in `folder` on a free port."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command("scripts/serve.py", "--port", "0", *arguments),
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline() + process.stdout.readline()
        found = re.search(r"open (http://\S+),", said)
        assert found, said + log.read_text()
        yield Server(process, found[1], log)
    finally:
        process.kill()
        process.communicate()


def serve_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[TestClient], None], *overrides: str, **options: Any
) -> None:
    """Have `scripts/serve.py` serve in this process, call `look` with a client of it, and end."""

    def answer(app: FastAPI, service: Service, listener: socket, grace: float, protocol: type[Any]) -> None:
        with TestClient(app, base_url="http://localhost") as http:
            look(http)

    monkeypatch.chdir(folder)
    monkeypatch.setattr("inference.server.run.serve_until_signal", answer)
    monkeypatch.setattr("inference.server.logs.log_as_json", lambda: None)
    serve(list(overrides), port=0, **options)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return as soon as `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
