"""What a server does by the section `generation`, and by the fields of a request that say otherwise."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from config.errors import UserError
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from tests.server_process import serve_here
from tests.workspace import Workspace

PROMPT = "The quick brown"
CONTEXT = 32
Post = Callable[..., Any]
Asked = Callable[[Post], None]


@pytest.fixture
def asked(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asks a server that runs with some settings; it is the command's own, but for the socket."""

    def ask(ask_all: Asked, *overrides: str, **options: Any) -> None:
        def look(http: TestClient) -> None:
            def post(path: str = "completions", **body: Any) -> Any:
                return http.post(f"/v1/{path}", json=body)

            ask_all(post)

        serve_here(workspace.folder, monkeypatch, look, *overrides, **options)

    return ask


def written(workspace: Workspace, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The tokens that the engine writes with the shipped settings, or with `options`."""
    request = Request(prompt, count, SamplingSettings(temperature=0.8, top_p=0.95), 3, **options)
    return [piece.token for piece in Engine(workspace.model, workspace.tokenizer).generate([request])]


def text_of(answer: Any) -> str:
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


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation after the system message `contents[0]`."""
    roles = ["system", *(["user", "assistant"] * len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


class TestTruncation:
    def test_the_oldest_messages_of_a_conversation_go(self, asked: Callable[..., None]) -> None:
        settings: dict[str, Any] = {"max_tokens": 16, "seed": 3, "path": "chat/completions"}
        whole = turns(*"abcdefgh")

        def ask_all(post: Post) -> None:
            answer = post(messages=whole, truncation="auto", **settings).json()
            alone = post(messages=turns(*"afgh"), truncation="auto", **settings).json()
            assert (answer["truncated"], alone["truncated"]) == (True, False)
            assert (answer["choices"], answer["usage"]) == (alone["choices"], alone["usage"])
            assert (
                answer["usage"]["prompt_tokens"] == 13
            ), "3 a message, and one for the answer, within half the context"
            parts = post(messages=whole, truncation="auto", stream=True, **settings).text
            assert parts.count('"truncated":true') == parts.count("data: {")
            assert "truncated" not in post(messages=turns(*"ab"), stream=True, **settings).text
            refused = post(messages=turns(*"abcdefghijkl"), **settings)
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            refused = post(messages=turns("a", "b", "c", PROMPT * 20), truncation="auto", **settings)
            assert refused.json()["error"]["code"] == "context_length_exceeded"

        asked(ask_all, chat=True)

    def test_of_another_prompt_the_newest_tokens_stay(self, workspace: Workspace, asked: Callable[..., None]) -> None:
        ids = [40 + place for place in range(50)]

        def ask_all(post: Post) -> None:
            for wanted, room in ((5, 20), (15, CONTEXT - 15), (100, CONTEXT // 2)):
                answer = post(prompt=[ids, ids[:3]], max_tokens=wanted, seed=3, truncation="auto").json()
                assert answer["truncated"] and answer["usage"]["prompt_tokens"] == room + 3
                tokens = written(workspace, ids[-room:], min(wanted, CONTEXT - room))
                assert answer["choices"][0]["text"] == workspace.tokenizer.decode(tokens)

        asked(ask_all, max_prompt_tokens=20)


class TestForms:
    def test_a_request_without_a_form_gets_the_servers(self, asked: Callable[..., None], tmp_path: Path) -> None:
        schema = tmp_path / "schema.json"
        schema.write_text('{"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}')
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 14, "seed": 3}

        def ask_for_digits(post: Post) -> None:
            assert re.fullmatch("[0-9]{3}", text_of(post(**body)))
            assert not re.match("[0-9]{3}", text_of(post(**body, response_format={"type": "text"})))
            assert text_of(post(**body, response_format={"type": "json_object"})).startswith("{")

        def ask_for_json(post: Post) -> None:
            whole = {**body, "max_tokens": 200, "logit_bias": {str(place): -100 for place in (9, 10, 13, 32, 220)}}
            assert isinstance(json.loads(text_of(post(**whole)))["n"], bool)

        asked(ask_for_digits, "generation.regex='[0-9]{3}'")
        asked(ask_for_json, f"generation.json_schema={schema}", "generation.context=slide")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("generation.regex='(a'", "The regular expression '(a' cannot be used"),
            ("generation.json_schema=nowhere.json", "nowhere.json is not a file"),
            ("generation.num_samples=2", "generation.num_samples: a request says by its field n"),
        ],
    )
    def test_what_is_refused(self, asked: Callable[..., None], override: str, message: str) -> None:
        with pytest.raises(UserError, match=re.escape(message)):
            asked(lambda post: None, override)
