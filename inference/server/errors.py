"""Refusals as OpenAI words them: a status, and one sentence that names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What OpenAI knows and this server has no counterpart for; other names are unknown.
UNSUPPORTED = frozenset(
    "audio best_of function_call functions modalities prediction reasoning_effort suffix tool_choice "
    "tool_calls tools web_search_options".split()
)
# Where a field takes values of several kinds, one sentence says which.
EITHER = {
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": "must be a text or a list of up to 16 texts of 1 to 1,000 characters",
    "content": 'must be a text or a list of {"type": "text", "text": ...}',
}


class ApiError(Exception):
    """An answer other than 200: `message` is for a person, `code` for a program, `param` the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 429:
            return "rate_limit_error"
        if self.status in (408, 504):
            return "timeout_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The error in the shape that every OpenAI client reads."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400 for a value of the field `param`."""
    return ApiError(400, f"Invalid '{param}': {message}.", code, param)


def too_busy() -> ApiError:
    """429, with the time after which to try again."""
    message = "The server has as many requests as it can take. Try again in a moment."
    return ApiError(429, message, "server_busy", headers={"retry-after": "1"})


def shutting_down() -> ApiError:
    """503 for what comes, or is not finished, when the server ends."""
    return ApiError(503, "The server is shutting down.", "shutting_down")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors about a request's body, as one sentence with the path of the field."""
    error = errors[0]
    kind, where = str(error["type"]), list(error["loc"])[1:]
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it ends too early")
        return ApiError(400, f"The body of the request is not valid JSON: {reason}.", "invalid_json")
    if kind == "value_error" and not where:  # of fields that don't go together
        param, _, message = str(error["msg"]).removeprefix("Value error, ").partition(": ")
        return invalid(param, message)
    if not where:
        return ApiError(400, "The body of the request must be a JSON object.", "invalid_type")
    named = next((place for place, part in enumerate(where) if part in EITHER), None)
    if named is not None and len(where) > named + 1:
        param = _path(where[: named + 1])
        return invalid(param, EITHER[where[named]], "invalid_type")
    param = _path(where)
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", "missing_required_parameter", param)
    if kind == "extra_forbidden":
        if where[-1] in UNSUPPORTED:
            return ApiError(400, f"This server does not support '{param}'.", "unsupported_parameter", param)
        return ApiError(400, f"Unrecognized request argument: '{param}'.", "unknown_parameter", param)
    message = str(error["msg"]).removesuffix(".")
    got = repr(error.get("input"))
    shown = f", not {got}" if len(got) <= 80 else ""
    return invalid(param, message[:1].lower() + message[1:] + shown, "invalid_type" if "type" in kind else kind)


def _path(where: Sequence[Any]) -> str:
    """`messages[0].content`, as one writes it; names of the kinds among which a value may be are left out."""
    path = ""
    for part in where:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
    return path
