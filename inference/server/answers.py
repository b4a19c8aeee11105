"""What the server answers, in OpenAI's two formats: whole, or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from inference.engine import Piece
from inference.server.likelihoods import (
    ChatLikelihoods,
    Likelihood,
    TextLikelihoods,
    Trail,
    chat_likelihoods,
    text_likelihoods,
)

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """See `errors.ApiError`."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 200."""

    error: ErrorDetail


class Defaults(BaseModel):
    """What a request that leaves a setting out gets; null where it is drawn anew."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None


class ModelCard(BaseModel):
    """The model that is served. The fields after `owned_by` are not in OpenAI's interface."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "quern"
    context_length: int
    parameters: int
    chat: bool
    defaults: Defaults


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    """Tokens of all prompts and all choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What every answer and chunk begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    truncated: bool = False
    """Whether the beginning of a prompt was left out. Not in OpenAI's interface; chunks have it where it is true."""


class TextChoice(BaseModel):
    """One text that was written, or the next part of it."""

    text: str
    index: int
    logprobs: TextLikelihoods | None = None
    finish_reason: Finish | None


class Completion(Answer):
    """Answer, or chunk, of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLikelihoods | None = None
    finish_reason: Finish


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """The next part of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The next part of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLikelihoods | None = None
    finish_reason: Finish | None


class ChatChunk(Answer):
    """Chunk of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


@dataclass
class Written:
    """What has been written of one choice, or what came of it since the last chunk.

    `likelihoods` are those of its tokens; None where nobody asked.
    """

    text: str = ""
    finish: Finish | None = None
    likelihoods: list[Likelihood] | None = None

    def add(self, piece: Piece, trail: Trail | None) -> None:
        """Take the next piece of it; `trail` follows the choice's tokens where their probabilities are asked for."""
        assert piece.finish != "error", "which ends the generation"
        self.text += piece.text
        self.finish = piece.finish
        if trail is not None:
            self.likelihoods = [*(self.likelihoods or []), *trail.follow(piece)]


def _head(prefix: str, kind: str, model: str, system_fingerprint: str, truncated: bool) -> dict[str, Any]:
    """The fields that all chunks of an answer have; `object` among them, as chunks hold only what is set."""
    return {
        "object": kind,
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": system_fingerprint,
        **({"truncated": True} if truncated else {}),
    }


class Format(Protocol):
    """One of the two formats."""

    def begin(self, index: int) -> BaseModel | None:
        """The chunk that opens choice `index`, if there is one."""

    def chunk(self, index: int, written: Written) -> BaseModel:
        """The chunk with what came of a choice."""

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk with the usage."""

    def whole(self, choices: Sequence[Written], usage: Usage) -> BaseModel:
        """The answer in one."""


class ChatFormat:
    """/v1/chat/completions; `truncated` as in `Answer`."""

    def __init__(self, model: str, system_fingerprint: str, tokenizer: Tokenizer, truncated: bool = False) -> None:
        self._tokenizer = tokenizer
        self._head = _head("chatcmpl", "chat.completion.chunk", model, system_fingerprint, truncated)

    def begin(self, index: int) -> BaseModel:
        """The chunk that says who speaks."""
        return self._chunk(index, Delta(role="assistant", content=""), Written())

    def chunk(self, index: int, written: Written) -> BaseModel:
        """The chunk with what came of a choice."""
        delta = Delta(content=written.text) if written.text else Delta()
        return self._chunk(index, delta, written)

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk with the usage."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def whole(self, choices: Sequence[Written], usage: Usage) -> BaseModel:
        """The answer in one."""
        answers = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=one.text),
                logprobs=self._likelihoods(one),
                finish_reason=one.finish or "length",
            )
            for index, one in enumerate(choices)
        ]
        return ChatCompletion(**{**self._head, "object": "chat.completion"}, choices=answers, usage=usage)

    def _chunk(self, index: int, delta: Delta, written: Written) -> ChatChunk:
        choice = ChunkChoice(
            index=index, delta=delta, logprobs=self._likelihoods(written), finish_reason=written.finish
        )
        return ChatChunk(**self._head, choices=[choice])

    def _likelihoods(self, written: Written) -> ChatLikelihoods | None:
        return None if written.likelihoods is None else chat_likelihoods(self._tokenizer, written.likelihoods)


class TextFormat:
    """/v1/completions; `echoes` are the prompts to put before what is written, one for each choice.

    `truncated` as in `Answer`.
    """

    def __init__(
        self,
        model: str,
        system_fingerprint: str,
        tokenizer: Tokenizer,
        echoes: Sequence[str] | None,
        truncated: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._head = _head("cmpl", "text_completion", model, system_fingerprint, truncated)
        self._echoes = echoes

    def begin(self, index: int) -> BaseModel | None:
        """The chunk with the prompt, if it is echoed."""
        return self.chunk(index, Written(self._echoes[index])) if self._echoes is not None else None

    def chunk(self, index: int, written: Written) -> BaseModel:
        """The chunk with what came of a choice."""
        return Completion(**self._head, choices=[self._choice(index, written)])

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk with the usage."""
        return Completion(**self._head, choices=[], usage=usage)

    def whole(self, choices: Sequence[Written], usage: Usage) -> BaseModel:
        """The answer in one."""
        echoes = self._echoes or [""] * len(choices)
        pairs = enumerate(zip(echoes, choices, strict=True))
        texts = [self._choice(index, one, echo) for index, (echo, one) in pairs]
        return Completion(**self._head, choices=texts, usage=usage)

    def _choice(self, index: int, one: Written, echo: str = "") -> TextChoice:
        found = None if one.likelihoods is None else text_likelihoods(self._tokenizer, one.likelihoods)
        return TextChoice(text=echo + one.text, index=index, logprobs=found, finish_reason=one.finish)
