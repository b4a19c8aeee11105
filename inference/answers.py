"""What a model answers with the likeliest token every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

SLOTS = 8


def greedy_answers(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[tuple[Sequence[int], int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """The answer to each question, and whether the model ended it itself, not the limit or the end of its context.

    A question is the ids of a prompt, and the token that ends an answer besides end-of-text. The model must be in
    evaluation mode.
    """
    room = [model.config.context_length - len(prompt) for prompt, _ in questions]
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=max(1, min(max_new_tokens, left)),
            sampling=SamplingSettings(temperature=0.0),
            stop_tokens=(end,),
            answer=True,
        )
        for (prompt, end), left in zip(questions, room, strict=True)
    ]
    texts, ended = [""] * len(requests), [False] * len(requests)
    for piece in Engine(model, tokenizer, min(SLOTS, len(requests))).generate(requests):
        texts[piece.sequence] += piece.text
        ended[piece.sequence] = piece.finish == "stop"
    return list(zip(texts, ended, strict=True))
