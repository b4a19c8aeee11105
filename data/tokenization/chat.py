"""Conversations as token ids, by a chat template in the form that Hugging Face's tokenizers have.

The template writes the special tokens; what people and models say is encoded with special tokens as plain text, so
nobody can end a turn or speak in another role by writing `<|end|>` or `<|system|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from data.tokenization.special import ASSISTANT, END, SYSTEM, USER, split_special

if TYPE_CHECKING:
    from data.tokenization.protocol import Tokenizer

ROLES = ("system", "user", "assistant")
TEMPLATE_TOKENS = {SYSTEM, USER, ASSISTANT, END}
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('there is no role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

GENERATED, GENERATED_END = "\ue002", "\ue003"
BLANK = "\x1f"
MARK = re.compile(f"(?P<left>{BLANK}?)\ue000(?P<number>[0-9]+)\ue001(?P<right>{BLANK}?)|{GENERATED}|{GENERATED_END}")

Messages = Sequence[Mapping[str, Any]]


def render_messages(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The conversation as one text, to read or to send to another tool; with the prompt for an answer, if asked for.

    To give it to a model use `encode_messages`: in the text, a special token that somebody wrote looks like a real one.
    Raises `UserError` for messages that are none, or if the tokenizer has no chat template.
    """
    return _render(tokenizer, checked_messages(messages), add_generation_prompt)


def encode_messages(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids of the conversation, and for each whether it is trained: what the assistant says and the token that ends it.

    For messages without special tokens in them, the ids are those of `transformers`' `apply_chat_template`. Raises
    `UserError` as `render_messages` does, and where the template changes what the messages say.
    """
    parts = _parts(tokenizer, checked_messages(messages), add_generation_prompt)
    ids: list[int] = []
    trained: list[bool] = []
    plain: list[tuple[str, bool]] = []

    def encode_plain(after: int | None) -> None:
        """Encode neighbouring text as one, as tokens may span its parts; those that touch an answer are trained."""
        text = "".join(text for text, _ in plain)
        flags = b"".join((b"\1" if flag else b"\0") * len(text) for text, flag in plain)
        found, spans = tokenizer.encode_between(text, ids[-1] if ids else None, after)
        ids.extend(found)
        trained.extend(b"\1" in flags[start:end] for start, end in spans)
        plain.clear()

    for part, flag in parts:
        if isinstance(part, str):
            plain.append((part, flag))
            continue
        encode_plain(part)
        ids.append(part)
        trained.append(flag)
    encode_plain(None)
    return ids, trained


def checked_messages(messages: Messages) -> list[dict[str, str]]:
    """`messages` with nothing but role and content, so that a template can write nothing else that somebody said.

    Raises `UserError` where one lacks them, has an unknown role, or is a system message and not the first.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise UserError('messages must be a list of {"role": ..., "content": ...}, with one or more in it.')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f'Message {number} must be {{"role": ..., "content": ...}}, not {message!r}.')
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"Message {number} has no {key!r}.")
        if message["role"] not in ROLES:
            raise UserError(f"Message {number} has the role {message['role']!r}; choose from {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise UserError(f"The content of message {number} must be text, not {type(message['content']).__name__}.")
        if message["role"] == "system" and number > 1:
            raise UserError(f"Message {number} is a system message; only the first one may be.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _parts(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool
) -> list[tuple[str | int, bool]]:
    """What the template writes and what the messages say, in order: text or special id, and whether it is trained.

    The template is rendered with a marker in place of each content, so that the two can be told apart. White space at
    the ends of a marker shows which contents the template trims.
    """
    marked = [{**message, "content": f"{BLANK}\ue000{n}\ue001{BLANK}"} for n, message in enumerate(messages)]
    text = _render(tokenizer, marked, add_generation_prompt, marked=True)
    rendered = _render(tokenizer, messages, add_generation_prompt)
    for trim in (str, _without_line_ends, _without_first_line_ends):
        contents = [trim(message["content"]) for message in messages]
        pieces = list(_pieces(text, contents))
        if "".join(piece for _, piece in pieces) == rendered:
            break
    else:
        raise UserError(
            "The tokenizer's chat template changes what the messages say, so they cannot be encoded safely."
        )
    answers = [message["role"] == "assistant" for message in messages]
    if GENERATED in text:
        return _as_marked(tokenizer, pieces)
    return _as_answers(tokenizer, pieces, answers)


def _without_line_ends(content: str) -> str:
    return content.strip("\n")


def _without_first_line_ends(content: str) -> str:
    return content.lstrip("\n")


def _pieces(text: str, contents: Sequence[str]) -> Iterator[tuple[int | str | None, str]]:
    """The pieces of a marked text: what it says, and whose it is, the number of a message or None for the template.

    Where the template marks what is generated, the mark comes in place of whose it is, with nothing said.
    """
    end = 0
    for found in MARK.finditer(text):
        yield None, text[end : found.start()]
        end = found.end()
        if found["number"] is None:
            yield found[0], ""
            continue
        content = contents[int(found["number"])]
        content = content if found["left"] else content.lstrip()
        yield int(found["number"]), content if found["right"] else content.rstrip()
    yield None, text[end:]


def _as_marked(tokenizer: Tokenizer, pieces: Sequence[tuple[int | str | None, str]]) -> list[tuple[str | int, bool]]:
    """Parts of which those are trained that the template marks as generated."""
    parts: list[tuple[str | int, bool]] = []
    trained = False
    for owner, text in pieces:
        trained = owner == GENERATED if isinstance(owner, str) else trained
        written = split_special(text, tokenizer.special_tokens) if owner is None else [text]
        parts += [(part, trained) for part in written]
    return parts


def _as_answers(
    tokenizer: Tokenizer, pieces: Sequence[tuple[int | str | None, str]], answers: Sequence[bool]
) -> list[tuple[str | int, bool]]:
    """Parts of which answers are trained, and what the template writes after them up to the first special token."""
    parts: list[tuple[str | int, bool]] = []
    ending = False
    for owner, text in pieces:
        if isinstance(owner, int):
            ending = answers[owner]
            parts.append((text, ending))
            continue
        for part in split_special(text, tokenizer.special_tokens):
            parts.append((part, ending))
            ending = ending and isinstance(part, str)
    return parts


def _render(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool, *, marked: bool = False
) -> str:
    from data.tokenization.templates import render

    if tokenizer.chat_template is None:
        names = ", ".join(sorted(TEMPLATE_TOKENS))
        raise UserError(
            f"The tokenizer has no chat template. Train one whose data.tokenizer.special_tokens hold {names}."
        )
    values = {"messages": messages, "add_generation_prompt": add_generation_prompt, **tokenizer.named_tokens}
    return render(tokenizer.chat_template, values, marked=marked)
