"""The probabilities of the tokens of an answer, in OpenAI's two formats."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel

from inference.choosing import TokenLogprobs
from inference.engine import Piece
from inference.text import Detokenizer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

LEAST = -9999.0  # what OpenAI gives for a probability of zero, whose logarithm JSON can't hold


class Alternative(BaseModel):
    """A token that might stand in a place; `bytes` are those of its text, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[Alternative]


class ChatLikelihoods(BaseModel):
    """`logprobs` of a chat."""

    content: list[ChatToken]
    refusal: None = None


class TextLikelihoods(BaseModel):
    """`logprobs` of a completion, one entry for each token; `text_offset` is in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@dataclass(frozen=True)
class Likelihood:
    """A token of an answer; `offset` is where it begins, in characters."""

    token: int
    offset: int
    found: TokenLogprobs


class Trail:
    """Follows the tokens of one choice, and gives each out as soon as its text is out.

    So a token whose text is part of a stop text, or that ends the answer, is not among them. `own_text` as in
    `Detokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer, own_text: bool) -> None:
        self._tokenizer = tokenizer
        self._held: deque[Likelihood] = deque()
        self._detokenizer = Detokenizer(tokenizer, own_text)
        self._characters = self._shown = 0

    def follow(self, piece: Piece) -> list[Likelihood]:
        """Take the next piece; the tokens that are certain now."""
        assert piece.logprobs is not None
        data = self._tokenizer.decode_bytes([piece.token], skip_special_tokens=True)
        offset = self._characters
        self._characters += len(self._detokenizer.push(piece.token))
        with suppress(UnicodeDecodeError):  # what came before may have been half a character, which is one only now
            offset = max(0, self._characters - len(data.decode()))
        self._held.append(Likelihood(piece.token, offset, piece.logprobs))
        self._shown += len(piece.text)
        ready = []
        while self._held and (self._held[0].offset < self._shown or piece.finish == "length"):
            ready.append(self._held.popleft())
        return ready


def chat_likelihoods(tokenizer: Tokenizer, tokens: Sequence[Likelihood]) -> ChatLikelihoods:
    """As /v1/chat/completions has them."""

    def fields(token: int, logprob: float) -> dict[str, object]:
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}

    content = [
        ChatToken.model_validate(
            {
                **fields(one.token, one.found.logprob),
                "top_logprobs": [Alternative.model_validate(fields(*other)) for other in one.found.top],
            }
        )
        for one in tokens
    ]
    return ChatLikelihoods(content=content, refusal=None)


def text_likelihoods(tokenizer: Tokenizer, tokens: Sequence[Likelihood]) -> TextLikelihoods:
    """As /v1/completions has them; a token that is no whole text is written as its bytes."""

    def text(token: int) -> str:
        data = tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return TextLikelihoods(
        tokens=[text(one.token) for one in tokens],
        token_logprobs=[max(one.found.logprob, LEAST) for one in tokens],
        top_logprobs=[{text(token): max(value, LEAST) for token, value in one.found.top} for one in tokens],
        text_offset=[one.offset for one in tokens],
    )
