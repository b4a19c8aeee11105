"""Reading examples from JSON lines or Parquet, and refusing what is none before anything is computed.

Four formats, one per file:

    {"text": "..."}                                               every token is trained
    {"prompt": "...", "completion": "..."}                        the completion is trained
    {"messages": [{"role": "user", "content": "..."}, ...]}       what the assistant says is trained
    {"prompt": "...", "chosen": "...", "rejected": "..."}         one answer is preferred (data/examples/preferences.py)

Further keys of a record are ignored. A folder of Parquet files, or that of a downloaded source, will do as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from config.errors import UserError
from data.examples.checks import Messages, Unusable, json_fault, kind_of, messages_in, text_in
from data.examples.columns import Columns
from data.examples.downloaded import is_source, source_rows
from data.examples.preferences import PreferenceExample, preference
from data.examples.tables import is_table, table_files, table_rows
from data.formats.jsonl import numbered_lines
from data.formats.rows import Fault
from data.formats.streams import BrokenStream

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PREFERENCES, PREFERENCES_IN_MESSAGES = "preferences", "preferences in messages"
ANSWERS = {PREFERENCES: "prompt-completion", PREFERENCES_IN_MESSAGES: "messages"}  # as which format a side of a pair is
FORMATS = {"text": ("text",), "prompt-completion": ("prompt", "completion"), "messages": ("messages",)}
SHOWN = 10
_HELP = (
    '{"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or '
    '{"prompt": ..., "chosen": ..., "rejected": ...}; see docs/finetuning.md'
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
    """A conversation, of which the assistant's turns are trained."""

    location: str
    messages: Messages

    @property
    def given(self) -> str:
        """Everything before the assistant first speaks; where it speaks first, what it says."""
        first = next(index for index, message in enumerate(self.messages) if message["role"] == "assistant")
        return orjson.dumps(self.messages[: first or 1]).decode()


Example = TextExample | CompletionExample | ChatExample | PreferenceExample


def format_of(example: Example) -> str:
    """The name of an example's format: a key of `FORMATS`, or one of the two of preferences."""
    if isinstance(example, PreferenceExample):
        return PREFERENCES if isinstance(example.prompt, str) else PREFERENCES_IN_MESSAGES
    if isinstance(example, TextExample):
        return "text"
    return "prompt-completion" if isinstance(example, CompletionExample) else "messages"


def read_examples(path: Path, most_unusable: float = 0.0, columns: Columns | None = None) -> list[Example]:
    """All examples of a .jsonl file, plain or compressed (.gz, .zst), or of Parquet, in order; empty lines are skipped.

    Of a folder of Parquet, those of all its files, and likewise of the folder of a downloaded source; there, rows that
    are none are left out, and counted on standard error, as long as they are no more than the share `most_unusable`.
    `columns` give the keys of an example other names.

    Raises `UserError`: for a column that is nowhere; for unusable lines with their number, then file, line and reason
    of the first ten; for a file that mixes formats; for one that holds no example at all.
    """
    columns = columns or Columns()
    examples: list[Example] = []
    unusable: list[str] = []
    for location, row in _rows(path, columns):
        try:
            examples.append(_example(location, row, columns))
        except Unusable as reason:
            unusable.append(f"{location}: {reason}")
    columns.refuse_unknown(path)
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


def _rows(path: Path, columns: Columns) -> Iterator[tuple[str, bytes | dict[str, Any] | Fault | None]]:
    """Place and content of each row of a file, of a folder of Parquet, or of a downloaded source."""
    if is_source(path):
        yield from source_rows(path, columns)
    elif is_table(path):
        for name in table_files(path):
            with _opened(name) as file:
                for number, row in table_rows(file, columns):
                    yield f"{name}:{number}", row
    else:
        for number, line in _lines(path):
            yield f"{path}:{number}", line


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of every line that is not blank; None for one too long to be held."""
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: examples are read from {', '.join(SUFFIXES)} and .parquet files, or a folder.")
    try:
        with _opened(path) as file:
            yield from numbered_lines(file, path.name)
    except BrokenStream as error:
        raise UserError(f"{path} is {error.reason}: it cannot be decompressed to its end. Fetch it again.") from error


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}. Name a file of examples with --dataset.") from error
    except PermissionError as error:
        raise UserError(f"May not read {path}.") from error


def _example(location: str, row: bytes | dict[str, Any] | Fault | None, columns: Columns) -> Example:
    if row is None:
        raise Unusable("the line is longer than 32 MiB")
    if isinstance(row, Fault):
        raise Unusable(f"cannot be read: {row.excerpt}")
    try:
        record = row if isinstance(row, dict) else orjson.loads(row)
    except orjson.JSONDecodeError as error:
        assert isinstance(row, bytes)
        raise Unusable(json_fault(row, error)) from error
    if not isinstance(record, dict):
        raise Unusable(f"not an object but {kind_of(record)}")
    record = columns.rename(record)
    if "chosen" in record and "rejected" in record:
        return preference(location, record)
    whole = [name for name, keys in FORMATS.items() if all(key in record for key in keys)]
    if len(whole) > 1:
        raise Unusable(f"has the keys of two formats, {whole[0]} and {whole[1]}; keep one")
    if not whole:
        raise Unusable(_missing(record))
    if whole == ["text"]:
        return TextExample(location, text_in(record, "text"))
    if whole == ["prompt-completion"]:
        return CompletionExample(location, text_in(record, "prompt"), text_in(record, "completion"))
    messages = messages_in(record, "messages")
    if all(message["role"] != "assistant" for message in messages):
        raise Unusable("has no assistant message, so there is nothing to train on")
    return ChatExample(location, messages)


def _missing(record: dict[str, Any]) -> str:
    for keys in [("chosen", "rejected"), *FORMATS.values()]:
        if any(key in record for key in keys):
            return f'has no "{next(key for key in keys if key not in record)}"'
    found = ", ".join(str(key) for key in list(record)[:6])
    formats = '"text", "prompt" with "completion", "messages", "chosen" with "rejected"'
    return f"has none of {formats} (its keys: {found or 'none'}; --map KEY=COLUMN gives a column another name)"


def _refusal(path: Path, unusable: list[str], total: int) -> str:
    rows = "rows" if is_table(path) else "lines"
    lines = [f"{len(unusable):,} of {total:,} {rows} of {path} cannot be used:"]
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
