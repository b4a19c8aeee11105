"""`scripts/serve.py` as OpenAI's own client sees it: completions, chats, streams, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient

from inference.engine import Engine, Request
from inference.prompting import chat_prompt, chat_stop_tokens
from inference.sampling import SamplingSettings
from tests.server_process import CONTEXT, Server, serve_here, server_workspace, serving
from tests.workspace import Workspace

MODEL = "small-run/7"
PROMPT = "The quick brown"
TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who jumps?"}]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return server_workspace(tmp_path_factory.mktemp("workspace"), "training.seed=1")


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    with serving(workspace.folder, "--chat") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def expected(workspace: Workspace, ids: list[int], count: int, seed: int, **sampling: Any) -> str:
    """What the engine writes alone, with the shipped settings or others."""
    settings = SamplingSettings(**{"temperature": 0.8, "top_p": 0.95, **sampling})
    request = Request(ids, count, settings, seed, stop_tokens=chat_stop_tokens(workspace.tokenizer))
    return "".join(piece.text for piece in Engine(workspace.model, workspace.tokenizer).generate([request]))


class TestModels:
    def test_the_one_that_is_served(self, client: openai.OpenAI, workspace: Workspace) -> None:
        [card] = client.models.list().data
        assert (card.id, card.object, card.owned_by) == (MODEL, "model", "quern")
        assert card.created == int(workspace.checkpoint.stat().st_mtime)
        assert card.model_dump()["context_length"] == CONTEXT
        assert client.models.retrieve(MODEL) == card

    def test_there_is_no_other(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("gpt-4")
        assert caught.value.code == "model_not_found"


class TestCompletions:
    def test_the_text_is_that_of_the_engine(self, client: openai.OpenAI, workspace: Workspace) -> None:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, seed=3)
        ids = workspace.tokenizer.encode(PROMPT)
        assert answer.choices[0].text == expected(workspace, ids, 20, 3)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
        assert answer.usage.total_tokens == len(ids) + 20

    def test_settings_reach_the_engine(self, client: openai.OpenAI, workspace: Workspace) -> None:
        ids = workspace.tokenizer.encode(PROMPT)
        chosen: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.5}, {"top_p": 0.0}]
        for sampling in chosen:
            fixed: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 3}
            answer = client.completions.create(**fixed, **sampling)
            wanted = {**sampling, "top_p": sampling.get("top_p", 0.95) or 1e-9}
            assert answer.choices[0].text == expected(workspace, ids, 20, 3, **wanted)
        extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "typical_p": 0.9}
        extra |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, seed=3, extra_body=extra)
        assert answer.choices[0].text == expected(workspace, ids, 20, 3, **extra)

    def test_a_bias_bans_or_forces_a_token(self, client: openai.OpenAI, workspace: Workspace) -> None:
        [token] = workspace.tokenizer.encode("e")
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        assert client.completions.create(**settings, logit_bias={str(token): 100}).choices[0].text == "eeeee"

    def test_a_text_that_repeats_itself_is_looked_up(
        self, client: openai.OpenAI, server: Server, workspace: Workspace
    ) -> None:
        [token] = workspace.tokenizer.encode("e")
        names = ("quern_proposed_tokens_total", "quern_accepted_tokens_total")
        before = [server.metric(name) for name in names]
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
        answer = client.completions.create(**settings, logit_bias={str(token): 100})
        assert answer.choices[0].text == "e" * 60
        proposed, accepted = (server.metric(name) - old for name, old in zip(names, before, strict=True))
        assert 30 < accepted <= proposed

    def test_probabilities(self, client: openai.OpenAI, workspace: Workspace) -> None:
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "seed": 3, "logprobs": 2}
        choice = client.completions.create(**settings).choices[0]
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
        request = Request(workspace.tokenizer.encode(PROMPT), 30, SamplingSettings(0.8, top_p=0.95), 3, logprobs=2)
        pieces = list(Engine(workspace.model, workspace.tokenizer).generate([request]))
        assert found.token_logprobs == pytest.approx([piece.logprobs.logprob for piece in pieces if piece.logprobs])
        assert all(len(top) == 2 for top in found.top_logprobs)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
        parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**settings, stream=True)]
        assert [token for part in parts if part for token in part.tokens or []] == found.tokens

        stop = choice.text[-4:-2]
        stopped = client.completions.create(**settings, stop=stop).choices[0]
        assert stopped.finish_reason == "stop" and stopped.logprobs and stopped.logprobs.text_offset
        assert max(stopped.logprobs.text_offset) < len(stopped.text), "no token of the stop text"

    def test_choices_and_prompts(self, client: openai.OpenAI, workspace: Workspace) -> None:
        """Every prompt has n choices; choice i has seed + i."""
        ids = workspace.tokenizer.encode(PROMPT)
        answer = client.completions.create(model=MODEL, prompt=[PROMPT, "def"], n=2, max_tokens=9, seed=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices[:2]] == [expected(workspace, ids, 9, 3 + i) for i in (0, 1)]
        as_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=9, seed=3)
        assert as_ids.choices[0].text == answer.choices[0].text

    def test_a_stop_text_is_not_part_of_the_answer(self, client: openai.OpenAI) -> None:
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "seed": 3}
        text = client.completions.create(**settings).choices[0].text
        stop = text[10:12]
        answer = client.completions.create(**settings, stop=[stop, "never there"]).choices[0]
        assert answer.text == text[: text.index(stop)]
        assert answer.finish_reason == "stop"

    def test_echo(self, client: openai.OpenAI) -> None:
        settings: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9, "seed": 3, "echo": True}
        text = client.completions.create(**settings).choices[0].text
        assert text.startswith(PROMPT) and len(text) > len(PROMPT)
        parts = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
        assert "".join(parts) == text

    def test_it_ends_where_the_context_ends(self, client: openai.OpenAI, workspace: Workspace) -> None:
        prompt = workspace.tokenizer.encode(PROMPT * 100)
        prompt = (prompt * (CONTEXT // len(prompt) + 1))[: CONTEXT - 5]
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=100, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens <= 5


class TestChat:
    def test_the_answer_is_that_of_the_template(self, client: openai.OpenAI, workspace: Workspace) -> None:
        ids, _ = chat_prompt(workspace.tokenizer, TALK, CONTEXT, 0)
        answer = client.chat.completions.create(model=MODEL, messages=TALK, max_completion_tokens=20, seed=4)
        assert answer.choices[0].message.content == expected(workspace, ids, 20, 4)
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)

    def test_probabilities(self, client: openai.OpenAI, workspace: Workspace) -> None:
        answer = client.chat.completions.create(
            model=MODEL, messages=TALK, max_tokens=20, seed=4, logprobs=True, top_logprobs=3
        )
        found = answer.choices[0].logprobs
        assert found is not None and found.content
        text = b"".join(bytes(token.bytes or []) for token in found.content).decode(errors="replace")
        assert text == answer.choices[0].message.content
        for token in found.content:
            best = [other.logprob for other in token.top_logprobs]
            assert len(best) == 3 and best == sorted(best, reverse=True) and token.logprob <= best[0] + 1e-6
        plain = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=2, logprobs=True)
        assert plain.choices[0].logprobs and plain.choices[0].logprobs.content
        assert plain.choices[0].logprobs.content[0].top_logprobs == []
        with pytest.raises(openai.BadRequestError, match="top_logprobs"):
            client.chat.completions.create(model=MODEL, messages=TALK, top_logprobs=3)

    def test_an_answer_in_the_form_of_a_schema(self, client: openai.OpenAI) -> None:
        schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
        }
        settings: dict[str, Any] = {"model": MODEL, "messages": TALK, "max_tokens": 300, "seed": 1}
        answer = client.chat.completions.create(**settings, response_format=form).choices[0]
        assert list(json.loads(answer.message.content or "")) == ["sure"]
        form["json_schema"]["schema"] = {"type": "nothing"}
        with pytest.raises(openai.BadRequestError, match="The JSON schema cannot be used: .*nothing") as caught:
            client.chat.completions.create(**settings, response_format=form)
        assert caught.value.param == "response_format"

    def test_a_form_that_cannot_be_followed_to_its_end(self, client: openai.OpenAI, server: Server) -> None:
        lists = [{"type": "array", "items": {"const": number}} for number in range(2100)]  # more than llguidance keeps
        schema = {"type": "object", "properties": {"b": {"anyOf": lists}}, "required": ["b"]}
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        settings: dict[str, Any] = {"model": MODEL, "messages": TALK, "max_tokens": 100, "response_format": form}
        once = client.with_options(max_retries=0)
        with pytest.raises(openai.InternalServerError, match="form of the text could not be followed") as caught:
            once.chat.completions.create(**settings)
        assert (caught.value.code, caught.value.type) == ("form_failed", "server_error")
        with pytest.raises(openai.APIError, match="form of the text could not be followed"):
            for _ in once.chat.completions.create(**settings, stream=True):
                pass
        assert once.chat.completions.create(model=MODEL, messages=TALK, max_tokens=2).choices
        assert server.metric("quern_running_sequences") == 0

    def test_parts_developer_and_the_answer_sent_back(self, client: openai.OpenAI) -> None:
        settings: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "seed": 4}
        plain = client.chat.completions.create(messages=TALK, **settings)
        parts: Any = [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            TALK[1],
        ]
        assert client.chat.completions.create(messages=parts, **settings).choices == plain.choices
        client.chat.completions.create(messages=[*TALK, plain.choices[0].message, TALK[1]], **settings)

    def test_a_model_that_was_not_tuned_on_messages_says_so(self, workspace: Workspace) -> None:
        with serving(workspace.folder, "--model-name", "base") as other:
            assert not other.client().models.retrieve("base").model_dump()["chat"]
            with pytest.raises(openai.BadRequestError, match="not fine-tuned on messages.*/v1/completions"):
                other.client().chat.completions.create(model="base", messages=TALK)
            assert other.stop() == 0


class TestStreams:
    def test_the_chunks_joined_are_the_answer(self, client: openai.OpenAI) -> None:
        settings: dict[str, Any] = {"model": MODEL, "messages": TALK, "max_tokens": 30, "seed": 5, "n": 2}
        whole = client.chat.completions.create(**settings)
        texts, finishes = ["", ""], ["", ""]
        usage: Any = None
        for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finishes[choice.index] = choice.finish_reason or ""
            usage = chunk.usage or usage
        assert texts == [choice.message.content for choice in whole.choices]
        assert finishes == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage

    def test_the_text_comes_while_it_is_written(self, client: openai.OpenAI, server: Server) -> None:
        stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=CONTEXT, seed=1, stream=True)
        first = next(stream)
        assert first.choices[0].model_dump()["finish_reason"] is None
        assert server.metric("quern_running_sequences") == 1
        stream.close()

    def test_as_bytes_it_is_what_the_standard_says(self, server: Server) -> None:
        answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, end = answer.text.split("\n\n")
        assert events and all(event.startswith('data: {"') for event in events)
        assert (done, end) == ("data: [DONE]", "")
        assert '"usage"' not in answer.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature below zero": ({"temperature": -1}, "temperature"),
    "top_p of two": ({"top_p": 2}, "top_p"),
    "a word for a number": ({"temperature": "hot"}, "temperature"),
    "yes for a number": ({"max_tokens": True}, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "no number": ({"temperature": float("nan")}, "temperature"),
    "too many choices": ({"n": 100}, "n"),
    "an empty stop text": ({"stop": [""]}, "stop"),
    "a bias for no token": ({"logit_bias": {"300": 1}}, "logit_bias"),
    "a bias beyond all measure": ({"logit_bias": {"3": 101}}, "logit_bias"),
    "probabilities of a prompt": ({"echo": True, "logprobs": 1}, "logprobs"),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "a spelling mistake": ({"temprature": 1}, "temprature"),
    "what it lacks": ({"suffix": "end"}, "suffix"),
    "an unknown token": ({"prompt": [1, 300]}, "prompt"),
    "half a character": ({"prompt": "\ud800"}, "prompt"),
    "a prompt of another kind": ({"prompt": {"text": "x"}}, "prompt"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_a_sentence_names_the_field(self, server: Server, case: str) -> None:
        fields, named = REFUSED[case]
        answer = server.post("/v1/completions", {"prompt": PROMPT, **fields})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (named, "invalid_request_error")
        assert f"'{named}'" in error["message"] and error["message"].endswith(".")

    def test_a_prompt_that_is_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match=r"2,048 tokens.*your prompt resulted in 2,100") as caught:
            client.completions.create(model=MODEL, prompt=[5] * 2100)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "х" * 5000}])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")

    def test_another_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist.*'small-run/7'") as caught:
            client.completions.create(model="gpt-4", prompt=PROMPT)
        assert caught.value.code == "model_not_found"

    @pytest.mark.parametrize(
        ("messages", "named"),
        [
            ([], "messages"),
            ([{"role": "tool", "content": "x"}], "messages[0].role"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
            ([{"role": "user"}], "messages[0].content"),
            ([TALK[1], TALK[0]], "messages"),
        ],
    )
    def test_messages_that_are_none(self, client: openai.OpenAI, messages: Any, named: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=messages)
        assert caught.value.param == named

    def test_bodies_that_are_no_json(self, server: Server) -> None:
        for body in ("{", "", "[" * 100_000, b"\xff\xfe", "[]", '"text"', '{"seed": 1' + "0" * 5000 + "}"):
            answer = server.post("/v1/completions", body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        answer = server.post("/v1/completions", {"prompt": PROMPT}, **{"content-type": "text/plain"})
        assert answer.status_code == 415

    def test_addresses_and_methods(self, server: Server) -> None:
        assert httpx.get(f"{server.address}/v1/nothing", timeout=60).json()["error"]["code"] == "unknown_url"
        answer = httpx.get(f"{server.address}/v1/completions", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


class TestPage:
    def test_it_comes_with_a_strict_policy_and_nothing_from_elsewhere(self, server: Server) -> None:
        page = httpx.get(f"{server.address}/", timeout=60)
        assert page.headers["content-type"].startswith("text/html") and "<title>Quern" in page.text
        policy = page.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"):
            assert part in policy.split("; ")
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "http:" not in page.text and "https:" not in page.text

    def test_its_parts(self, server: Server) -> None:
        for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
            part = httpx.get(f"{server.address}/page/{name}", timeout=60)
            assert (part.status_code, part.headers["content-type"].partition(";")[0]) == (200, kind)

    def test_other_files_are_out_of_reach(self, server: Server) -> None:
        for path in ("/page/../server/app.py", "/page/%2e%2e/server/app.py", "/page/..%2fengine.py", "/page/nothing"):
            assert httpx.get(f"{server.address}{path}", timeout=60).status_code == 404

    def test_no_other_site_may_read_or_send(self, server: Server) -> None:
        asked = {"origin": "https://example.com", "access-control-request-method": "POST"}
        answer = httpx.options(f"{server.address}/v1/completions", headers=asked, timeout=60)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_compile_makes_the_steps_of_the_server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` itself stands aside: told is that it is asked, and that the server answers with what it made."""
    made: list[str] = []

    def compile_nothing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        made.append(function.__name__)
        return function

    def answer_once(http: TestClient) -> None:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 3}
        answers.append(http.post("/v1/completions", json=body).json()["choices"][0]["text"])

    answers: list[str] = []
    monkeypatch.setattr(torch, "compile", compile_nothing)
    ids = workspace.tokenizer.encode(PROMPT)
    for compiled in (False, True):
        serve_here(workspace.folder, monkeypatch, answer_once, f"generation.compile={str(compiled).lower()}")
        assert bool(made) == compiled
    assert answers == [expected(workspace, ids, 4, 3)] * 2


def test_a_smaller_context_is_that_of_the_server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = workspace.tokenizer.encode(PROMPT)

    def look(http: TestClient) -> None:
        [card] = http.get("/v1/models").json()["data"]
        assert card["context_length"] == len(prompt) + 5
        body = {"prompt": PROMPT, "max_tokens": 20, "seed": 3}
        answer = http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["text"] == expected(workspace, prompt, 5, 3)
        refused = http.post("/v1/completions", json={**body, "prompt": PROMPT * 3})
        assert refused.json()["error"]["code"] == "context_length_exceeded"

    serve_here(workspace.folder, monkeypatch, look, context_length=len(prompt) + 5)


def test_the_fingerprint_changes_with_what_changes_a_text(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights too, in a file of the same name, size and time."""
    prints: list[str] = []

    def look(http: TestClient) -> None:
        answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        prints.append(answer.json()["system_fingerprint"])

    other = server_workspace(tmp_path, "training.seed=2")
    found = workspace.checkpoint.stat()
    os.utime(other.checkpoint, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert found.st_size == other.checkpoint.stat().st_size
    for override in ("generation.quantize=none", "generation.quantize=int8", "generation.precision=bf16"):
        serve_here(workspace.folder, monkeypatch, look, override)
    serve_here(workspace.folder, monkeypatch, look, "generation.stop=[END]")
    serve_here(other.folder, monkeypatch, look)
    assert len(set(prints)) == 5
    serve_here(workspace.folder, monkeypatch, look)
    assert prints[-1] == prints[0]
