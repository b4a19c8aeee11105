"""The application: OpenAI's paths, the page, and what a watcher asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from inference.server.answers import ChatCompletion, Completion, ErrorBody, ModelCard, ModelList, Usage, Written
from inference.server.errors import ApiError, from_validation
from inference.server.limits import ErrorResponse, Gate, Limits
from inference.server.metrics import CONTENT_TYPE
from inference.server.prompts import (
    Served,
    Task,
    chat_task,
    check_model,
    choices_of,
    completion_task,
    is_short,
    unknown_model,
)
from inference.server.protocol import ChatBody, CompletionBody, GenerationBody
from inference.server.service import Generation, Service
from inference.server.streams import EventStream, Watch

PAGE = Path(__file__).parents[1] / "page"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {"text/event-stream": {"schema": EVENT}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        "4XX": "The request is at fault.",
        "500": "The server is at fault.",
        "503": "The server is shutting down.",
        "504": "It took longer than the server allows.",
    }.items()
}
B = TypeVar("B", bound=GenerationBody)


def create_app(service: Service, served: Served, limits: Limits, origins: Sequence[str] = ()) -> FastAPI:
    """The application over a started service. `origins` are the other sites whose pages may use it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.attach(asyncio.get_running_loop())
        yield
        service.stop()

    app = FastAPI(
        title="Quern",
        description="A language model behind OpenAI's interface.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(Gate, limits=limits, metrics=service.metrics)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    _add_generation(app, service, served)
    _add_models(app, served)
    _add_health(app, service)
    _add_page(app)
    return app


def _add_generation(app: FastAPI, service: Service, served: Served) -> None:
    @app.post("/v1/completions", **_documented(Completion, "Go on with a text"))
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await _generate(request, body, service, served, completion_task)

    @app.post("/v1/chat/completions", **_documented(ChatCompletion, "Answer a conversation"))
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await _generate(request, body, service, served, chat_task)


def _documented(model: type[BaseModel], summary: str) -> dict[str, Any]:
    whole = {"model": model, "description": "Whole, or with `stream` in chunks.", "content": STREAM}
    return {"summary": summary, "response_model": None, "responses": {200: whole, **ERRORS}}


def _add_models(app: FastAPI, served: Served) -> None:
    @app.get("/v1/models", summary="The model that is served", responses={"4XX": ERRORS["4XX"]})
    async def models() -> ModelList:
        return ModelList(data=[served.card])

    @app.get("/v1/models/{name:path}", summary="One model", responses={"4XX": ERRORS["4XX"]})
    async def model(name: str) -> ModelCard:
        if name != served.card.id:
            raise unknown_model(name, served)
        return served.card


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        status, code = ("ok", 200) if service.healthy else ("failing", 503)
        return JSONResponse({"status": status, "running": service.running, "waiting": service.waiting}, code)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")


async def _generate(
    request: Request, body: B, service: Service, served: Served, task_of: Callable[[B, Served], Task]
) -> Response:
    """Let the engine write, and answer in one or as a stream."""
    check_model(body, served)
    generation = service.reserve(choices_of(body))
    watch = Watch(generation, request.receive, request.state.deadline)
    try:
        short = is_short(body)
        task = task_of(body, served) if short else await asyncio.to_thread(task_of, body, served)
        service.metrics.prompt_tokens.inc(task.prompt_tokens)
        generation.begin(task.requests)
        if body.stream:
            events = _events(generation, task, body.includes_usage, request.state)
            return EventStream(events, watch)
    except BaseException:
        watch.close()
        raise
    try:
        choices, written = await _collect(generation, task)
    finally:
        watch.close()
    usage = _usage(task, written)
    request.state.log = usage.model_dump()
    return Response(task.format.whole(choices, usage).model_dump_json(), media_type="application/json")


async def _collect(generation: Generation, task: Task) -> tuple[list[Written], int]:
    """All choices of a generation, whole, and how many tokens they have."""
    choices, written = [Written() for _ in task.requests], 0
    async for arrived in generation.batches():
        written += len(arrived)
        for place, piece in arrived:
            choices[place].add(piece, task.trails[place])
    return choices, written


async def _events(generation: Generation, task: Task, with_usage: bool, state: Any) -> AsyncIterator[BaseModel]:
    """The chunks of a stream: what has come of each choice since the last ones."""
    written = 0
    for index in range(len(task.requests)):
        if (opening := task.format.begin(index)) is not None:
            yield opening
    async for arrived in generation.batches():
        written += len(arrived)
        news: dict[int, Written] = {}
        for place, piece in arrived:
            news.setdefault(place, Written()).add(piece, task.trails[place])
        for place, part in news.items():
            if part.text or part.finish or part.likelihoods:
                yield task.format.chunk(place, part)
    usage = _usage(task, written)
    state.log = usage.model_dump()
    if with_usage:
        yield task.format.closing(usage)


def _usage(task: Task, written: int) -> Usage:
    total = task.prompt_tokens + written
    return Usage(prompt_tokens=task.prompt_tokens, completion_tokens=written, total_tokens=total)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return ErrorResponse(error)


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return ErrorResponse(from_validation(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    known = {
        404: (f"There is nothing at {asked}.", "unknown_url"),
        405: (f"{asked} is not allowed.", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, ("The body of the request can't be read.", "invalid_body"))
    return ErrorResponse(ApiError(error.status_code, message, code, headers=error.headers))
