"""Whether the fields of a record are what an example needs, and the reason where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

ROLES = ("system", "user", "assistant")

Messages = tuple[Mapping[str, str], ...]
"""A conversation or a part of one; a message has a `role` of `ROLES` and `content`."""


class Unusable(Exception):
    """Why a record is no example."""


def text_in(record: Mapping[str, Any], key: str, where: str = "") -> str:
    """The text under `key`. Raises `Unusable` where that is none, or blank; `where` begins the reason."""
    value = record[key]
    if not isinstance(value, str):
        raise Unusable(f'{where}"{key}" is {kind_of(value)}, not a string')
    if not value or value.isspace():
        raise Unusable(f'{where}"{key}" is empty')
    return value


def messages_in(record: Mapping[str, Any], key: str) -> Messages:
    """The messages under `key`, without further keys. Raises `Unusable` where one of them is none, or there is none."""
    value = record[key]
    if not isinstance(value, list):
        raise Unusable(f'"{key}" is {kind_of(value)}, not a list')
    if not value:
        raise Unusable(f'"{key}" is empty')
    return tuple(_message(message, index, f"{key}[{index}] ") for index, message in enumerate(value))


def _message(message: Any, index: int, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Unusable(f"{where}is {kind_of(message)}, not an object")
    for key in ("role", "content"):
        if key not in message:
            raise Unusable(f'{where}has no "{key}"')
    if message["role"] not in ROLES:
        raise Unusable(f"{where}has the role {message['role']!r}; the roles are {', '.join(ROLES)}")
    if message["role"] == "system" and index:
        raise Unusable(f"{where}is a system message; only the first may be one")
    return {"role": message["role"], "content": text_in(message, "content", where)}


def kind_of(value: Any) -> str:
    """What a value is, in JSON's own words where it has one."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def json_fault(line: bytes, error: orjson.JSONDecodeError) -> str:
    """Why a line is not JSON, and where."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"not valid UTF-8 at byte {fault.start + 1}"
    return f"not valid JSON: {error.msg.partition(': line ')[0]}, column {error.colno}"
