"""Reading examples from JSON lines, and refusing what is none before anything is computed.

Three formats, one per file:

    {"text": "..."}                                               every token is trained
    {"prompt": "...", "completion": "..."}                        the completion is trained
    {"messages": [{"role": "user", "content": "..."}, ...]}       what the assistant says is trained

Further keys of a record are ignored. The folder of a downloaded source will do in place of a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from config.errors import UserError
from data.examples.downloaded import is_source, source_rows
from data.formats.jsonl import numbered_lines
from data.formats.streams import BrokenStream

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FORMATS = {"text": ("text",), "prompt-completion": ("prompt", "completion"), "messages": ("messages",)}
ROLES = ("system", "user", "assistant")
SHOWN = 10
_HELP = (
    '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}; '
    "see docs/finetuning.md"
)


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text, trained from its first token to its end."""

    location: str
    """File and line, such as `data.jsonl:17`."""
    text: str

    @property
    def given(self) -> str:
        """What the model is given and is not trained to say; examples that share it belong on one side of a split."""
        return self.text


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """A text and what is to follow it, which alone is trained. Nothing is put between the two."""

    location: str
    prompt: str
    completion: str

    @property
    def given(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation, of which the assistant's turns are trained. A message has a `role` of `ROLES` and `content`."""

    location: str
    messages: tuple[Mapping[str, str], ...]

    @property
    def given(self) -> str:
        """Everything before the assistant first speaks; where it speaks first, what it says."""
        first = next(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        return orjson.dumps(self.messages[: first or 1]).decode()


Example = TextExample | CompletionExample | ChatExample


class _Unusable(Exception):
    """Why a line is no example."""


def format_of(example: Example) -> str:
    """The key of `FORMATS` for an example."""
    if isinstance(example, TextExample):
        return "text"
    return "prompt-completion" if isinstance(example, CompletionExample) else "messages"


def read_examples(path: Path, most_unusable: float = 0.0) -> list[Example]:
    """All examples of a .jsonl file, plain or compressed (.gz, .zst), in order; empty lines are skipped.

    Of the folder of a downloaded source, those of all its files; there, rows that are none are left out, and counted on
    standard error, as long as they are no more than the share `most_unusable`.

    Raises `UserError`: for unusable lines with their number, then file, line and reason of the first ten; for a file
    that mixes formats; for one that holds no example at all.
    """
    examples: list[Example] = []
    unusable: list[str] = []
    for location, row in _rows(path):
        try:
            examples.append(_example(location, row))
        except _Unusable as reason:
            unusable.append(f"{location}: {reason}")
    total = len(unusable) + len(examples)
    if unusable and (not is_source(path) or len(unusable) > most_unusable * total):
        raise UserError(_refusal(path, unusable, total))
    if unusable:
        what = f"{len(unusable):,} of {total:,} rows of {path} cannot be used and are left out"
        print(f"{what}, the first: {unusable[0]}", file=sys.stderr)
    if not examples:
        raise UserError(f"{path} holds no examples. Give it one per line: {_HELP}.")
    _refuse_mixture(path, examples)
    return examples


def _rows(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any] | None]]:
    """Place and content of each row of a file or of a downloaded source."""
    if is_source(path):
        yield from source_rows(path, {key for keys in FORMATS.values() for key in keys})
        return
    for number, line in _lines(path):
        yield f"{path}:{number}", line


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of every line that is not blank; None for one too long to be held."""
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: examples are read from {', '.join(SUFFIXES)} files, one JSON object per line.")
    try:
        with open(path, "rb") as file:
            yield from numbered_lines(file, path.name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"There is no file {path}. Name a JSON-lines file of examples with --dataset.") from error
    except PermissionError as error:
        raise UserError(f"May not read {path}.") from error
    except BrokenStream as error:
        raise UserError(f"{path} is {error.reason}: it cannot be decompressed to its end. Fetch it again.") from error


def _example(location: str, row: bytes | dict[str, Any] | None) -> Example:
    if row is None:
        raise _Unusable("the line is longer than 32 MiB, or the file ends too early")
    try:
        record = row if isinstance(row, dict) else orjson.loads(row)
    except orjson.JSONDecodeError as error:
        assert isinstance(row, bytes)
        raise _Unusable(_json_fault(row, error)) from error
    if not isinstance(record, dict):
        raise _Unusable(f"not an object but {_kind(record)}")
    whole = [name for name, keys in FORMATS.items() if all(key in record for key in keys)]
    if len(whole) > 1:
        raise _Unusable(f"has the keys of two formats, {whole[0]} and {whole[1]}; keep one")
    if not whole:
        raise _Unusable(_missing(record))
    if whole == ["text"]:
        return TextExample(location, _text_in(record, "text"))
    if whole == ["prompt-completion"]:
        return CompletionExample(location, _text_in(record, "prompt"), _text_in(record, "completion"))
    return ChatExample(location, _messages(record["messages"]))


def _json_fault(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"not valid UTF-8 at byte {fault.start + 1}"
    return f"not valid JSON: {error.msg.partition(': line ')[0]}, column {error.colno}"


def _missing(record: dict[str, Any]) -> str:
    for keys in FORMATS.values():
        if any(key in record for key in keys):
            return f'has no "{next(key for key in keys if key not in record)}"'
    found = ", ".join(str(key) for key in list(record)[:6])
    return f'has none of "text", "prompt" with "completion", "messages" (its keys: {found or "none"})'


def _text_in(record: dict[str, Any], key: str, where: str = "") -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _Unusable(f'{where}"{key}" is {_kind(value)}, not a string')
    if not value or value.isspace():
        raise _Unusable(f'{where}"{key}" is empty')
    return value


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list):
        raise _Unusable(f'"messages" is {_kind(value)}, not a list')
    if not value:
        raise _Unusable('"messages" is empty')
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}] "
        if not isinstance(message, dict):
            raise _Unusable(f"{where}is {_kind(message)}, not an object")
        for key in ("role", "content"):
            if key not in message:
                raise _Unusable(f'{where}has no "{key}"')
        if message["role"] not in ROLES:
            raise _Unusable(f"{where}has the role {message['role']!r}; the roles are {', '.join(ROLES)}")
        if message["role"] == "system" and index:
            raise _Unusable(f"{where}is a system message; only the first may be one")
        messages.append({"role": message["role"], "content": _text_in(message, "content", where)})
    if all(message["role"] != "assistant" for message in messages):
        raise _Unusable("has no assistant message, so there is nothing to train on")
    return tuple(messages)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's own words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def _refusal(path: Path, unusable: list[str], total: int) -> str:
    lines = [f"{len(unusable):,} of {total:,} lines of {path} cannot be used:"]
    lines += [f"  {reason}" for reason in unusable[:SHOWN]]
    if len(unusable) > SHOWN:
        lines.append(f"  and {len(unusable) - SHOWN:,} more")
    return "\n".join([*lines, f"Correct or remove them and run the command again. A line is {_HELP}."])


def _refuse_mixture(path: Path, examples: list[Example]) -> None:
    first: dict[str, Example] = {}
    counts: dict[str, int] = {}
    for example in examples:
        name = format_of(example)
        first.setdefault(name, example)
        counts[name] = counts.get(name, 0) + 1
    if len(counts) > 1:
        kinds = "; ".join(f"{counts[name]:,} are {name} (first: {first[name].location})" for name in counts)
        raise UserError(f"{path} mixes formats: {kinds}. Put each format into a file of its own.")
