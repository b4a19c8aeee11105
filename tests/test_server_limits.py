"""The server under those who leave, crowd, wait, guess keys or end it; and what it refuses to start with."""

from __future__ import annotations

import asyncio
import http.client
import json
import pickle
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.server_process import Server, eventually, server_workspace, serving
from tests.workspace import Workspace, command

LENGTH = 16_384  # of a text that takes seconds, as nothing in it can be guessed
LONG: dict[str, Any] = {"prompt": "The quick", "max_tokens": LENGTH, "temperature": 1, "seed": 3}
SHORT: dict[str, Any] = {"prompt": "The quick", "max_tokens": 1}
KEY = "sk-correct-horse"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return server_workspace(tmp_path_factory.mktemp("workspace"), f"model.context_length={LENGTH}")


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    """Two slots, two places in the queue, a short patience, a key."""
    narrow = ["--max-concurrent", "2", "--queue", "2", "--timeout", "60", "--max-body", "10KB"]
    narrow += ["--max-tokens", str(LENGTH)]
    with serving(workspace.folder, *narrow, "--max-prompt-tokens", "500", QUERN_API_KEY=KEY) as running:
        yield running


def idle(server: Server) -> bool:
    authorization = {"authorization": f"Bearer {KEY}"}
    names = ("quern_running_sequences", "quern_waiting_sequences")
    return all(server.metric(name, **authorization) == 0 for name in names)


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    return server.post("/v1/completions", body, authorization=f"Bearer {KEY}", **headers)


class TestClientsThatLeave:
    def test_in_mid_stream_the_slot_comes_back(self, server: Server) -> None:
        client = server.client(KEY)
        streams = [client.completions.create(model="small-run/7", stream=True, **LONG) for _ in range(4)]
        next(streams[0])
        assert not idle(server)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="small-run/7", **SHORT)
        for stream in streams:
            stream.close()
        eventually(lambda: idle(server))
        assert post(server, SHORT).status_code == 200

    def test_while_they_wait_for_a_whole_answer(self, server: Server) -> None:
        def left() -> float:
            return server.metric("quern_disconnects_total", authorization=f"Bearer {KEY}")

        before = left()
        connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(LONG), headers)
        eventually(lambda: not idle(server))
        connection.close()
        eventually(lambda: idle(server) and left() == before + 1)

    def test_before_their_body_is_there(self, server: Server) -> None:
        def cut_short() -> Iterator[bytes]:
            yield b'{"prompt": '
            raise ConnectionAbortedError

        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        with pytest.raises(ConnectionAbortedError):
            httpx.post(f"{server.address}/v1/completions", content=cut_short(), headers=headers)
        assert post(server, SHORT).status_code == 200


class TestLimits:
    def test_a_full_queue_says_when_to_come_again(self, server: Server) -> None:
        answers: list[httpx.Response] = []
        crowd = [
            threading.Thread(target=lambda: answers.append(post(server, {**LONG, "max_tokens": 1000})))
            for _ in range(9)
        ]
        for one in crowd:
            one.start()
        for one in crowd:
            one.join()
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses.keys() == {200, 429} and statuses[200] >= 4
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "server_busy"

    def test_sizes(self, server: Server) -> None:
        for body in (b" " * 20_000, b" " * 2_000_000):
            assert post(server, body).status_code == 413
        answer = post(server, {"prompt": [5] * 501})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")
        assert re.search("500 tokens.*501 tokens", answer.json()["error"]["message"])
        answer = post(server, {**SHORT, "max_tokens": LENGTH + 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
        assert post(server, {**SHORT, "n": 5}).json()["error"]["param"] == "n"

    @pytest.mark.slow
    def test_time(self, workspace: Workspace) -> None:
        with serving(workspace.folder, "--timeout", "0.5") as server:
            answer = server.post("/v1/completions", {**LONG, "n": 16})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            streamed = server.post("/v1/completions", {**LONG, "n": 16, "stream": True})
            assert streamed.status_code == 200 and "[DONE]" not in streamed.text
            assert '"code": "timeout"' in streamed.text.split("\n\n")[-2]
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(server.client().completions.create(model="small-run/7", stream=True, n=16, **LONG))
            eventually(lambda: server.metric("quern_running_sequences") == 0)


class TestKeysAndNames:
    @pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer ключ"])
    def test_without_the_key_nothing_opens(self, server: Server, given: str | None) -> None:
        headers = {} if given is None else {b"authorization": given.encode()}
        for path in ("/v1/models", "/metrics"):
            answer = httpx.get(f"{server.address}{path}", headers=headers, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/", "/health", "/page/page.js"):
            assert httpx.get(f"{server.address}{path}", timeout=60).status_code == 200

    def test_the_client_raises_what_one_expects(self, server: Server) -> None:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client(KEY).models.list().data

    @pytest.mark.slow
    def test_keys_of_a_file(self, workspace: Workspace) -> None:
        file = workspace.folder / "keys.txt"
        file.write_text("# ours\nfirst\n\nsecond\n")
        with serving(workspace.folder, "--api-key-file", str(file), "--host", "0.0.0.0") as server:
            for key, status in (("first", 200), ("second", 200), ("# ours", 401)):
                answer = httpx.get(
                    f"{server.address}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=60
                )
                assert answer.status_code == status
            assert httpx.get(f"{server.address}/health", headers={"host": "any.name"}, timeout=60).status_code == 200

    def test_a_name_that_is_not_its_own(self, server: Server) -> None:
        """As a page of a foreign site would reach it, whose name was made to point here."""
        answer = httpx.get(f"{server.address}/", headers={"host": "evil.example"}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "host_not_allowed")
        for name in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST:8000"):
            assert httpx.get(f"{server.address}/", headers={"host": name}, timeout=60).status_code == 200


def test_requests_have_ids_in_answers_and_log_and_no_text_in_it(server: Server) -> None:
    answer = post(server, {"prompt": "a secret", "max_tokens": 2}, **{"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    for bad in ("two words", "x" * 200, '"},{"'):
        assert post(server, SHORT, **{"x-request-id": bad}).headers["x-request-id"].startswith("req_")
    eventually(lambda: any(line.get("request_id") == "mine-1" for line in server.logged()))
    line = next(line for line in server.logged() if line.get("request_id") == "mine-1")
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 2)
    assert "secret" not in server.log.read_text() and KEY not in server.log.read_text()


@pytest.mark.slow
class TestTheEnd:
    def test_what_is_streaming_finishes(self, workspace: Workspace) -> None:
        with serving(workspace.folder) as server:
            stream = server.client().completions.create(model="small-run/7", stream=True, **{**LONG, "max_tokens": 400})
            next(stream)
            server.process.terminate()
            finishes = [chunk.choices[0].model_dump()["finish_reason"] for chunk in stream]
            assert finishes[-1] in ("length", "stop")
            assert server.process.wait(60) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.address}/health", timeout=60)

    def test_what_takes_longer_than_the_grace_is_told(self, workspace: Workspace) -> None:
        with serving(workspace.folder, "--grace", "0.2", "--max-concurrent", "1") as server:
            stream = server.client().completions.create(model="small-run/7", stream=True, **LONG)
            next(stream)
            answers: list[httpx.Response] = []
            waiting = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", LONG)))
            waiting.start()
            eventually(lambda: server.metric("quern_waiting_sequences") == 1)
            server.process.terminate()
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            waiting.join()
            assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")
            assert server.process.wait(60) == 0


@pytest.mark.slow
class TestWhatItRefusesToStartWith:
    def refusal(self, folder: Path, *arguments: str) -> str:
        done = subprocess.run(
            command("scripts/serve.py", "--port", "0", *arguments),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.splitlines()
        return line

    def test_an_open_door(self, workspace: Workspace) -> None:
        assert "--api-key-file" in self.refusal(workspace.folder, "--host", "0.0.0.0")
        assert "holds no key" in self.refusal(workspace.folder, "--api-key-file", "/dev/null")

    def test_half_a_checkpoint(self, workspace: Workspace, tmp_path: Path) -> None:
        half = tmp_path / "model_step_9.pt"
        content = workspace.checkpoint.read_bytes()
        half.write_bytes(content[: len(content) // 2])
        assert "not a whole checkpoint" in self.refusal(workspace.folder, "--checkpoint", str(half))

    def test_code_in_a_checkpoint(self, workspace: Workspace, tmp_path: Path) -> None:
        trap, proof = tmp_path / "model_step_9.pt", tmp_path / "proof"
        torch.save({"model": _Trap(str(proof)), "config": {}, "step": 1}, trap)
        assert "error: " in self.refusal(workspace.folder, "--checkpoint", str(trap))
        trap.write_bytes(pickle.dumps(_Trap(str(proof))))
        assert "error: " in self.refusal(workspace.folder, "--checkpoint", str(trap))
        assert not proof.exists()

    def test_more_texts_than_there_is_memory_for(self, workspace: Workspace) -> None:
        refusal = self.refusal(workspace.folder, "--max-concurrent", "1000000000")
        assert f"1,000,000,000 texts at once of up to {LENGTH:,} tokens" in refusal and "--max-concurrent" in refusal

    def test_a_port_that_is_taken(self, workspace: Workspace, server: Server) -> None:
        port = server.address.rpartition(":")[2]
        assert f"port {port}" in self.refusal(workspace.folder, "--port", port)


@pytest.mark.slow
def test_connections_that_never_ask_are_closed_and_too_many_are_refused(workspace: Workspace) -> None:
    """One that has asked may take its time with the body, and is answered."""
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    headers = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    headers += b"content-length: 2\r\n\r\n"
    with serving(workspace.folder, "--header-timeout", "2", "--max-connections", "3") as limited:
        place = ("127.0.0.1", int(limited.address.rpartition(":")[2]))

        def connected(*sent: bytes) -> socket.socket:
            connection = socket.create_connection(place, timeout=60)
            connection.sendall(b"".join(sent))
            return connection

        def closed(*sent: bytes) -> bytes:
            """What came before the end."""
            with connected(*sent) as connection:
                return b"".join(iter(lambda: connection.recv(4096), b""))

        slow = connected(headers)
        assert closed() == closed(b"GET /hea") == closed(headers[:-2]) == b""
        assert closed(whole, b"GET /hea").startswith(b"HTTP/1.1 200 OK")
        others = [connected(headers), connected(headers)]
        assert closed().startswith(b"HTTP/1.1 503 Service Unavailable")
        slow.sendall(b"{}")
        assert slow.recv(4096).startswith(b"HTTP/1.1 200 OK")
        for connection in (slow, *others):
            connection.close()


class _Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._path),)


@pytest.mark.slow
def test_a_thousand_connections_at_once_are_all_answered(server: Server) -> None:
    async def crowd() -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(limits=limits, timeout=120, headers=headers) as client:
            posts = [client.post(f"{server.address}/v1/completions", json=SHORT) for _ in range(1000)]
            return Counter(answer.status_code for answer in await asyncio.gather(*posts))

    statuses = asyncio.run(crowd())
    assert sum(statuses.values()) == 1000 and statuses.keys() == {200, 429}
    started = time.monotonic()
    assert post(server, SHORT).status_code == 200
    assert time.monotonic() - started < 30
    assert idle(server)
