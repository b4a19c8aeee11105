"""A server whose engine fails: those it was writing for are told, and the next ones are served."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from inference.engine import Engine, Piece, Request
from tests.server_process import eventually, serve_here, server_workspace
from tests.workspace import Workspace

TOGETHER = 2  # texts that the server takes
TOGETHER_ONLY: Any = {"max_concurrent": TOGETHER, "queue": 0, "timeout": 60.0}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return server_workspace(tmp_path_factory.mktemp("workspace"))


def ask_together(http: TestClient) -> list[Any]:
    """As many texts at once as the server takes, each of a request of its own."""
    bodies = [{"prompt": "The quick brown", "max_tokens": 30, "seed": seed} for seed in range(TOGETHER)]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(lambda body: http.post("/v1/completions", json=body), bodies))


@pytest.mark.parametrize("failures", [1, 2])
def test_a_step_that_fails_ends_what_is_running_and_no_more(
    failures: int, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second failure meets the attempt to write that follows the first: then the server says that it fails."""
    step, submit, left, begun = Engine.step, Engine.submit, [0], list[Request]()

    def counts(engine: Engine, request: Request) -> int:
        begun.append(request)
        return submit(engine, request)

    def fails(engine: Engine) -> list[Piece]:
        if left[0] == failures and len(begun) < TOGETHER:
            return []
        if left[0]:
            left[0] -= 1
            raise RuntimeError("a step that fails")
        return step(engine)

    def look(http: TestClient) -> None:
        begun.clear()
        left[0] = failures
        for refused in ask_together(http):
            assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine_failed")
        eventually(lambda: left[0] == 0)
        if failures == 1:
            eventually(lambda: http.get("/health").status_code == 200)
        else:
            assert http.get("/health").json()["status"] == "failing"
        written = ask_together(http)
        assert [answer.status_code for answer in written] == [200] * TOGETHER
        assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        alone = http.post("/v1/completions", json={"prompt": "The quick brown", "max_tokens": 30, "seed": 1})
        assert alone.json()["choices"] == written[1].json()["choices"]

    monkeypatch.setattr(Engine, "submit", counts)
    monkeypatch.setattr(Engine, "step", fails)
    serve_here(workspace.folder, monkeypatch, look, **TOGETHER_ONLY)


def test_a_request_on_which_the_engine_fails_ends_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Engine.submit

    def fails(engine: Engine, request: Request) -> int:
        if request.seed == 1:
            raise RuntimeError("a request that fails")
        return submit(engine, request)

    def look(http: TestClient) -> None:
        assert [answer.status_code for answer in ask_together(http)] == [200, 500]
        assert http.post("/v1/completions", json={"prompt": "a", "n": TOGETHER, "seed": 5}).status_code == 200

    monkeypatch.setattr(Engine, "submit", fails)
    serve_here(workspace.folder, monkeypatch, look, **TOGETHER_ONLY)
