"""From the body of a request to what the engine runs."""

from __future__ import annotations

import hashlib
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config.errors import UserError
from config.schema import GenerationConfig
from inference.constraints import Constraint, json_object, json_schema
from inference.engine import Request
from inference.prompting import bias_of, chat_prompt, chat_stop_tokens, stop_ids_of
from inference.sampling import SamplingSettings
from inference.server.answers import ChatFormat, Format, ModelCard, TextFormat
from inference.server.errors import ApiError, invalid
from inference.server.likelihoods import Trail
from inference.server.protocol import ChatBody, CompletionBody, GenerationBody, ObjectFormat, SchemaFormat

if TYPE_CHECKING:
    from data.tokenization import Tokenizer


SHORT = 2000  # characters, or tokens, of a prompt


@dataclass(frozen=True)
class Served:
    """The model behind the server, and how it may be asked.

    `weights` tells them, and their type and device, from others. `settings` are what a request that leaves them out
    gets, `form` the one that they ask for. `max_prompt_tokens` and `max_tokens` are None where the context alone is the
    limit.
    """

    card: ModelCard
    tokenizer: Tokenizer
    weights: str
    settings: GenerationConfig
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    form: Constraint | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with all that could change what a seed gives: OpenAI's `system_fingerprint`."""
        parts = (self.card.model_dump_json(), self.tokenizer.fingerprint, self.weights, self.settings.model_dump_json())
        said = " ".join(parts)
        return f"fp_{hashlib.sha256(said.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Task:
    """What the engine is to write, one request for each choice, and how it is answered.

    `trails` follow the tokens of each choice, where their probabilities are asked for.
    """

    requests: list[Request]
    prompt_tokens: int
    format: Format
    trails: list[Trail | None]


def choices_of(body: GenerationBody) -> int:
    """How many texts a request asks for."""
    return body.n * (len(body.prompts) if isinstance(body, CompletionBody) else 1)


def is_short(body: GenerationBody) -> bool:
    """Whether a task is made of `body` in less time than handing it to another thread takes."""
    if isinstance(body, CompletionBody):
        size = sum(len(prompt) for prompt in body.prompts)
    else:
        assert isinstance(body, ChatBody)
        size = sum(len(message.plain()["content"]) for message in body.messages) + 100 * len(body.messages)
    return size <= SHORT and body.response_format is None


def check_model(body: GenerationBody, served: Served) -> None:
    """Raise `ApiError` 404 if a request is for another model."""
    if body.model is not None and body.model != served.card.id:
        raise unknown_model(body.model, served)


def unknown_model(name: str, served: Served) -> ApiError:
    """404, with the model that there is."""
    message = f"The model {name!r} does not exist. This server has {served.card.id!r}."
    return ApiError(404, message, "model_not_found", "model")


def completion_task(body: CompletionBody, served: Served) -> Task:
    """What /v1/completions asks for. Takes a while for long prompts: not to be called in the event loop."""
    tokenizer = served.tokenizer
    wanted = _wanted(body.max_tokens, "max_tokens", served)
    room = _room(body, wanted, served)
    prompts, echoes, truncated = [], [], False
    for prompt in body.prompts:
        try:
            ids = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        except UserError as error:
            raise invalid("prompt", str(error).rstrip(".")) from error
        _check_known(ids, "prompt", tokenizer)
        if room is not None and len(ids) > room:
            ids, truncated = _newest(ids, room, tokenizer.prefix_ids), True
        prompts.append(_checked(ids or [tokenizer.end_of_text_id], "prompt", served))
        echoes += [prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=True)] * body.n
    answer = TextFormat(served.card.id, served.fingerprint, tokenizer, echoes if body.echo else None, truncated)
    return _task(body, served, prompts, [], wanted, answer)


def chat_task(body: ChatBody, served: Served) -> Task:
    """What /v1/chat/completions asks for. Takes a while for long conversations: not to be called in the event loop."""
    if not served.card.chat:
        message = (
            f"The model {served.card.id!r} was not fine-tuned on messages, so it can't chat. Use /v1/completions, "
            "fine-tune it with scripts/finetune.py, or start the server with --chat."
        )
        raise ApiError(400, message, "chat_not_supported", "model")
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    wanted = _wanted(asked, "max_completion_tokens" if newer else "max_tokens", served)
    room = _room(body, wanted, served)
    try:
        messages = [message.plain() for message in body.messages]
        ids, left_out = chat_prompt(served.tokenizer, messages, sys.maxsize if room is None else room, 0)
    except UserError as error:
        raise invalid("messages", str(error).rstrip(".")) from error
    answer = ChatFormat(served.card.id, served.fingerprint, served.tokenizer, left_out > 0)
    prompts = [_checked(ids, "messages", served)]
    return _task(body, served, prompts, chat_stop_tokens(served.tokenizer), wanted, answer)


def _check_known(ids: Iterable[int], named: str, tokenizer: Tokenizer) -> None:
    if (unknown := max(ids, default=0)) >= tokenizer.vocab_size:
        raise invalid(named, f"there is no token {unknown:,}; the vocabulary has {tokenizer.vocab_size:,}")


def _wanted(asked: int | None, named: str, served: Served) -> int:
    """How many tokens to write at most, if there is room for them; the field `named` asks for `asked`."""
    limit, default = served.max_tokens, served.settings.max_new_tokens
    if asked is None:
        return min(default, limit or default)
    if limit is not None and asked > limit:
        raise invalid(named, f"this server writes {limit:,} tokens at most, {asked:,} were asked for")
    return asked


def _room(body: GenerationBody, wanted: int, served: Served) -> int | None:
    """How many tokens a prompt may have before its beginning is left out, which leaves half a context or more to write,
    or all that is `wanted`; None where nothing is to be left out.
    """
    if body.truncation == "disabled":
        return None
    context = served.card.context_length
    return min(context - min(wanted, context // 2), served.max_prompt_tokens or context)


def _newest(ids: list[int], room: int, prefix: Sequence[int]) -> list[int]:
    """The end of `ids`, after the `prefix` that begins them, where one does."""
    kept = list(prefix) if ids[: len(prefix)] == list(prefix) and len(prefix) < room else []
    return [*kept, *ids[len(ids) - (room - len(kept)) :]]


def _checked(ids: list[int], param: str, served: Served) -> list[int]:
    """`ids`, where there is room for them and for one token more; else `ApiError`."""
    context, limit = served.card.context_length, served.max_prompt_tokens
    if len(ids) >= context:
        message = (
            f"This model's maximum context length is {context:,} tokens, of which one must be left to write. However, "
            f"your {param} resulted in {len(ids):,} tokens. Please reduce the length of the {param}."
        )
        raise ApiError(400, message, "context_length_exceeded", param)
    if limit is not None and len(ids) > limit:
        message = (
            f"This server takes prompts of {limit:,} tokens at most; your {param} resulted in {len(ids):,} tokens."
        )
        raise ApiError(400, message, "prompt_too_long", param)
    return ids


def _task(
    body: GenerationBody,
    served: Served,
    prompts: Sequence[list[int]],
    stop_tokens: Sequence[int],
    wanted: int,
    answer: Format,
) -> Task:
    settings = served.settings
    seed = body.seed if body.seed is not None else settings.seed
    first = secrets.randbits(63) if seed is None else seed
    sampling, form = sampling_of(body, served), _form(body, served)
    stops = tuple(settings.stop if body.stops is None else body.stops)
    own_ends = stop_ids_of(settings) if body.stop_token_ids is None else body.stop_token_ids
    _check_known(own_ends, "stop_token_ids", served.tokenizer)
    context, slides = served.card.context_length, settings.context == "slide"
    requests = [
        Request(
            prompt=ids,
            max_new_tokens=wanted if slides else min(wanted, context - len(ids)),
            sampling=sampling,
            seed=first + choice,
            stop=stops,
            stop_tokens=(*stop_tokens, *own_ends),
            logprobs=body.alternatives,
            constraint=form,
            answer=isinstance(body, ChatBody),
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
        )
        for ids in prompts
        for choice in range(body.n)
    ]
    asked_for = body.alternatives is not None
    tokenizer = served.tokenizer
    trails = [Trail(tokenizer, request.is_own_text(tokenizer)) if asked_for else None for request in requests]
    return Task(requests, sum(len(ids) for ids in prompts), answer, trails)


def _form(body: GenerationBody, served: Served) -> Constraint | None:
    """The form that a text must keep to."""
    asked, tokenizer = body.response_format, served.tokenizer
    if asked is None:
        return served.form
    try:
        if isinstance(asked, ObjectFormat):
            return json_object(tokenizer)
        return json_schema(asked.json_schema.json_schema, tokenizer) if isinstance(asked, SchemaFormat) else None
    except UserError as error:
        raise invalid("response_format", str(error).rstrip(".")) from error


def sampling_of(body: GenerationBody, served: Served) -> SamplingSettings:
    """The settings of a request, over those of the server."""
    settings = served.settings
    biases = dict(bias_of(settings)) if body.biases is None else body.biases
    _check_known(biases, "logit_bias", served.tokenizer)

    def given(name: str) -> float:
        value: float | None = getattr(body, name)
        return getattr(settings, name) if value is None else value

    return SamplingSettings(
        temperature=given("temperature"),
        top_k=int(given("top_k")),
        top_p=max(given("top_p"), 1e-9),  # OpenAI takes 0, for the likeliest token
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        typical_p=given("typical_p"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        logit_bias=tuple(biases.items()),
    )
