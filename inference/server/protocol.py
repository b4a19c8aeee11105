"""The bodies of OpenAI's completions and chat completions, as far as this server honours them, and its own additions.

A null is the same as leaving the field out. A field that would change the answer and can't be honoured is refused by
name; one that can't change it (`user`, `store`, ...) is accepted and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator
from pydantic.types import Strict

Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2.0, le=2.0)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[Whole, Field(ge=1, le=2**31 - 1)]
TokenName = Annotated[StrictStr, Field(pattern=r"^[0-9]{1,9}$")]
StopText = Annotated[StrictStr, Field(min_length=1, max_length=1000)]
TokenIds = Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    """What every object in a request has in common."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: StrictBool | None = None
    """Send one more chunk, with the number of tokens, at the end."""
    include_obfuscation: StrictBool | None = None
    """Accepted; nothing is padded here."""


class PlainFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaOfFormat(Body):
    """A JSON schema, which what is written keeps to."""

    name: StrictStr
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    description: StrictStr | None = None
    strict: StrictBool | None = None
    """Accepted; the schema is always enforced."""


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaOfFormat


class GenerationBody(Body):
    """What completions and chat completions share. A setting left out is that of the server's `generation` section."""

    model: StrictStr | None = None
    """The id in /v1/models; without one, the model that is served."""
    max_tokens: Positive | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] = 1
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=64)] | None = None
    """Tokens that end a text, besides the model's own; they are no part of it. Not in OpenAI's interface."""
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed and settings give the same text. Of several choices, choice i has seed + i."""
    temperature: Annotated[Number, Field(ge=0.0, le=2.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = None
    """Sample among the k likeliest tokens; 0 means all. Not in OpenAI's interface."""
    min_p: Annotated[Number, Field(ge=0.0, lt=1.0)] | None = None
    """Drop tokens less likely than this share of the likeliest. Not in OpenAI's interface."""
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100.0)] | None = None
    """Above 1 makes tokens of prompt and text less likely. Not in OpenAI's interface."""
    typical_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    """Sample among the most typical tokens of this total probability. Not in OpenAI's interface."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[TokenName, Annotated[Number, Field(ge=-100.0, le=100.0)]], Field(max_length=1024)] | None
    ) = None
    """What is added to the logits of tokens, by their ids."""
    response_format: Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    """The form that what is written keeps to, token by token."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: of a prompt that leaves no room to write the beginning is left out; of a conversation it is the oldest
    messages, but not a system message. The answer then says `truncated`. OpenAI has it for Responses."""
    user: StrictStr | None = None
    """Accepted, not used; so are the fields after it."""
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None

    @property
    def stops(self) -> list[str] | None:
        """The stop texts as a list; None where none were given."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def biases(self) -> dict[int, float] | None:
        """The logit bias by token; None where none was given."""
        return None if self.logit_bias is None else {int(token): value for token, value in self.logit_bias.items()}

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell for each place; None where no probabilities are asked for."""
        return None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _combinations(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: is only allowed where stream is true")
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions: a text to go on with."""

    prompt: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    ) = ""
    echo: StrictBool = False
    """Put the prompt before what is written."""
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    """The logarithms of the probabilities of the tokens, and of so many likeliest ones in each place."""

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell for each place; None where no probabilities are asked for."""
        return self.logprobs

    @model_validator(mode="after")
    def _no_likelihoods_of_prompts(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: this server can't tell those of a prompt, which echo asks for")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or its token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1)]
    name: StrictStr | None = None
    """Accepted, not used: the chat template has no place for it."""

    def plain(self) -> dict[str, str]:
        """Role and content as the chat template takes them; `developer` is OpenAI's newer word for `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions: a conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    """The newer name of max_tokens; where both are given, this one counts."""
    logprobs: StrictBool = False
    """Tell the logarithms of the probabilities of the tokens."""
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    """And of so many likeliest ones in each place."""

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell for each place; None where no probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _likelihoods(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: is only allowed where logprobs is true")
        return self
