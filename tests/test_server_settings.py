"""What a server does by the section `generation`, and by the fields of a request that say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from socket import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from inference.server.service import Service
from scripts.serve import serve
from tests.workspace import Workspace

PROMPT = "The quick brown"
CONTEXT = 32
Post = Callable[..., httpx.Response]
Asked = Callable[[Post], None]


@pytest.fixture
def asked(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asks a server that runs with some settings; it is the command's own, but for the socket."""

    def ask(ask_all: Asked, *overrides: str, **options: Any) -> None:
        def answer(app: FastAPI, service: Service, listener: socket, grace: float) -> None:
            with TestClient(app, base_url="http://localhost") as http:

                def post(path: str = "completions", **body: Any) -> httpx.Response:
                    return http.post(f"/v1/{path}", json=body)

                ask_all(post)

        monkeypatch.setattr("inference.server.run.serve_until_signal", answer)
        monkeypatch.setattr("inference.server.logs.log_as_json", lambda: None)
        serve(list(overrides), port=0, **options)

    return ask


def written(workspace: Workspace, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The tokens that the engine writes with the shipped settings, or with `options`."""
    request = Request(prompt, count, SamplingSettings(temperature=0.8, top_p=0.95), 3, **options)
    return [piece.token for piece in Engine(workspace.model, workspace.tokenizer).generate([request])]


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


class TestEnds:
    def test_stop_tokens(self, workspace: Workspace, asked: Callable[..., None]) -> None:
        whole = written(workspace, workspace.tokenizer.encode(PROMPT), 20)
        first, second = whole[4], whole[8]

        def until(token: int) -> str:
            return workspace.tokenizer.decode(whole[: whole.index(token)])

        def ask_all(post: Post) -> None:
            body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "seed": 3}
            answer = post(**body)
            assert text_of(answer) == until(first), "the server's own"
            assert answer.json()["choices"][0]["finish_reason"] == "stop"
            assert text_of(post(**body, stop_token_ids=[second])) == until(second)
            assert text_of(post(**body, stop_token_ids=[])) == workspace.tokenizer.decode(whole)
            unknown = post(**body, stop_token_ids=[300])
            assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "stop_token_ids")

        asked(ask_all, f"generation.stop_tokens=[{first}]")

    @pytest.mark.parametrize("context", ["auto", "stop", "slide"])
    def test_where_the_context_is_full(self, workspace: Workspace, asked: Callable[..., None], context: str) -> None:
        prompt = workspace.tokenizer.encode(PROMPT)
        count = 60 if context == "slide" else CONTEXT - len(prompt)

        def ask_all(post: Post) -> None:
            answer = post(prompt=PROMPT, max_tokens=60, seed=3)
            assert text_of(answer) == workspace.tokenizer.decode(written(workspace, prompt, count))
            assert answer.json()["usage"]["completion_tokens"] == count
            refused = post(prompt=PROMPT * 20, max_tokens=60)
            assert refused.json()["error"]["code"] == "context_length_exceeded"

        asked(ask_all, f"generation.context={context}")
