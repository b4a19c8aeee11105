"""Conversations as token ids, by a chat template in the form that Hugging Face's tokenizers have.

The template writes the special tokens; what people and models say is encoded with special tokens as plain text, so
nobody can end a turn or speak in another role by writing `<|end|>` or `<|system|>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from config.errors import UserError
from data.tokenization.special import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER, split_special

if TYPE_CHECKING:
    from jinja2 import Template

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

    def encode_plain() -> None:
        """Encode neighbouring text as one, as tokens may span its parts; those that touch an answer are trained."""
        found = tokenizer.encode("".join(text for text, _ in plain))
        flags = b"".join((b"\1" if flag else b"\0") * len(text.encode()) for text, flag in plain)
        ids.extend(found)
        position = 0
        for index in found:
            size = len(tokenizer.decode_bytes([index]))
            trained.append(b"\1" in flags[position : position + size])
            position += size
        plain.clear()

    for part, flag in parts:
        if isinstance(part, str):
            plain.append((part, flag))
            continue
        encode_plain()
        ids.append(part)
        trained.append(flag)
    encode_plain()
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

    The template is rendered with a marker in place of each content, so that the two can be told apart.
    """
    markers = [f"\ue000{number}\ue001" for number in range(len(messages))]
    marked = [{"role": message["role"], "content": marker} for message, marker in zip(messages, markers)]
    text = _render(tokenizer, marked, add_generation_prompt)
    rendered = _render(tokenizer, messages, add_generation_prompt)
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        if _fill(text, markers, contents) == rendered:
            break
    else:
        raise UserError(
            "The tokenizer's chat template changes what the messages say, so they cannot be encoded safely."
        )
    parts: list[tuple[str | int, bool]] = []
    ending = False
    for message, marker, content in zip(messages, markers, contents):
        before, found, text = text.partition(marker)
        if not found:
            text = before
            continue
        parts += _template_parts(tokenizer, before, ending)
        ending = message["role"] == "assistant"
        parts.append((content, ending))
    return parts + _template_parts(tokenizer, text, ending)


def _fill(text: str, markers: Sequence[str], contents: Sequence[str]) -> str:
    filled = ""
    for marker, content in zip(markers, contents):
        before, found, after = text.partition(marker)
        filled, text = (filled + before + content, after) if found else (filled, text)
    return filled + text


def _template_parts(tokenizer: Tokenizer, text: str, ending: bool) -> list[tuple[str | int, bool]]:
    """What the template wrote; after an answer (`ending`), all up to the first special token belongs to the answer."""
    parts: list[tuple[str | int, bool]] = []
    for part in split_special(text, tokenizer.special_tokens):
        parts.append((part, ending))
        ending = ending and isinstance(part, str)
    return parts


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        names = ", ".join(sorted(TEMPLATE_TOKENS))
        raise UserError(
            f"The tokenizer has no chat template. Train one whose data.tokenizer.special_tokens hold {names}."
        )
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
        )
    except TemplateError as error:
        raise UserError(f"The chat template refuses the messages: {error}.") from error


@cache
def _compiled(template: str) -> Template:
    """The template in a sandbox, with the functions that chat templates of the field rely on."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
