"""From examples to token ids with the trained part marked, cut to the context only in ways that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.errors import UserError
from data.examples.preferences import PreferenceExample
from data.examples.reading import ChatExample, CompletionExample, Example, TextExample
from data.tokenization.chat import encode_messages

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

TooLong = Literal["refuse", "truncate", "drop"]
SHOWN = 10


class Encoded(NamedTuple):
    """One sample-to-be: `ids` (tokens,) int32, and `trained` (tokens,) bool, true where the model learns to say it.

    The first token is never trained, since nothing stands before it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(slots=True)
class EncodedExamples:
    """Samples that fit the context, and what was done to examples that did not."""

    samples: list[Encoded] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    """The example that each sample was made of. A pair is two samples, the chosen side and then the rejected one."""
    too_long: int = 0
    shortened: int = 0
    dropped: list[str] = field(default_factory=list)
    """Locations of the examples left out."""
    untrained_turns: int = 0
    """Assistant messages that went with the beginning of a conversation."""


def encode_example(tokenizer: Tokenizer, example: TextExample | CompletionExample | ChatExample) -> Encoded:
    """The ids of an example. A text stands between two end-of-text tokens, as in pre-training; a completion ends in it.

    Prompt and completion are encoded one by one, so the prompt has the ids it will have when a completion is asked for.
    """
    if isinstance(example, TextExample):
        first = tokenizer.prefix_ids or [tokenizer.end_of_text_id]
        return _joined(first, [*tokenizer.encode(example.text), tokenizer.end_of_text_id])
    if isinstance(example, CompletionExample):
        answer = tokenizer.encode(example.completion, continued=bool(example.prompt))
        completion = [*answer, tokenizer.end_of_text_id]
        return _joined([*tokenizer.prefix_ids, *tokenizer.encode(example.prompt)], completion)
    ids, trained = encode_messages(tokenizer, [dict(message) for message in example.messages])
    mask = np.asarray(trained, dtype=np.bool_)
    mask[:1] = False
    return Encoded(np.asarray(ids, dtype=np.int32), mask)


def encode_pair(tokenizer: Tokenizer, example: PreferenceExample) -> list[Encoded]:
    """Both sides of a pair, the chosen one first, each with the prompt, of which nothing is trained."""
    if isinstance(example.prompt, str):
        sides = [CompletionExample(example.location, example.prompt, str(side)) for side in example.sides]
        return [encode_example(tokenizer, side) for side in sides]
    prompt = np.asarray(encode_messages(tokenizer, example.prompt, add_generation_prompt=True)[0], dtype=np.int32)
    pair = []
    for side in example.sides:
        ids, trained = encode_example(tokenizer, ChatExample(example.location, (*example.prompt, *side)))
        both = min(len(prompt), len(ids))
        differing = np.flatnonzero(prompt[:both] != ids[:both])  # where a template writes earlier turns otherwise
        trained[: differing[0] if len(differing) else both] = False
        pair.append(Encoded(ids, trained))
    return pair


def _joined(given: Sequence[int], trained: Sequence[int]) -> Encoded:
    mask = np.ones(len(given) + len(trained), dtype=np.bool_)
    mask[: len(given)] = False
    return Encoded(np.asarray([*given, *trained], dtype=np.int32), mask)


def encode_examples(
    tokenizer: Tokenizer, examples: Iterable[Example], context_length: int, too_long: TooLong
) -> EncodedExamples:
    """Samples of at most `context_length + 1` tokens.

    `refuse` raises `UserError` if there are any; `drop` leaves them out. `truncate` never cuts what is to be learned
    without a word: a text goes on in further samples, a prompt loses its beginning, a conversation its oldest turns
    (counted); an example whose trained part alone is too long is left out. `UserError` if none remains.
    """
    limit = context_length + 1
    result = EncodedExamples()
    total, longest, first = 0, 0, ""
    untrained: list[str] = []
    for example in examples:
        total += 1
        pieces = _encoded(tokenizer, example)
        untrained += [] if all(piece.trained.any() for piece in pieces) else [example.location]
        size = max(len(piece.ids) for piece in pieces)
        if size > limit:
            result.too_long += 1
            longest, first = max(longest, size), first or example.location
            pieces = list(_shortened(tokenizer, example, pieces, limit, result)) if too_long == "truncate" else []
            if pieces:
                result.shortened += 1
            else:
                result.dropped.append(example.location)
        result.samples += pieces
        result.examples += [example] * len(pieces)
    if untrained:
        named = ", ".join(untrained[:SHOWN]) + (" and more" if len(untrained) > SHOWN else "")
        raise UserError(
            f"{len(untrained):,} of {total:,} examples have nothing to train on, since the chat template marks none of "
            f"their tokens as the assistant's: {named}. Remove them, or correct the template."
        )
    if result.too_long and too_long == "refuse":
        raise UserError(_too_long(result.too_long, total, longest, first, context_length))
    if not result.samples:
        raise UserError(
            f"All {total:,} examples are longer than the model's context of {context_length:,} tokens, so "
            "nothing is left to train on. Shorten them, or start from a model with a longer context."
        )
    return result


def _too_long(count: int, total: int, longest: int, first: str, context_length: int) -> str:
    share = f"All {total:,} examples are" if count == total else f"{count:,} of {total:,} examples are"
    return (
        f"{share} longer than the model's context of {context_length:,} tokens; the longest has {longest:,}, "
        f"the first is {first}.\nShorten them, or choose what to do with them:\n"
        "  data.finetuning.too_long=truncate  cuts prompts at their beginning and conversations at their oldest turns, "
        "never completions; a text goes on in further samples\n"
        "  data.finetuning.too_long=drop      leaves them out"
    )


def _encoded(tokenizer: Tokenizer, example: Example) -> list[Encoded]:
    return (
        encode_pair(tokenizer, example)
        if isinstance(example, PreferenceExample)
        else [encode_example(tokenizer, example)]
    )


def _shortened(
    tokenizer: Tokenizer, example: Example, encoded: list[Encoded], limit: int, result: EncodedExamples
) -> Iterator[Encoded]:
    if isinstance(example, TextExample):
        yield from _pieces(encoded[0], limit)
    elif isinstance(example, ChatExample):
        yield from _latest_turns(tokenizer, example, limit, result)
    elif isinstance(example.prompt, str):
        cut, first = max(len(side.ids) for side in encoded) - limit, len(tokenizer.prefix_ids)
        if all(side.trained.sum() + cut + max(first, 1) <= len(side.ids) for side in encoded):
            lost = slice(first, first + cut)
            yield from (Encoded(np.delete(side.ids, lost), np.delete(side.trained, lost)) for side in encoded)
    else:
        yield from _latest_prompt(tokenizer, example, limit)


def _pieces(encoded: Encoded, limit: int) -> Iterator[Encoded]:
    """Every token trained once: a piece begins with the last token of the piece before, which is only read."""
    for start in range(0, len(encoded.ids) - 1, limit - 1):
        trained = encoded.trained[start : start + limit].copy()
        trained[0] = False
        yield Encoded(encoded.ids[start : start + limit], trained)


def _latest_turns(tokenizer: Tokenizer, example: ChatExample, limit: int, result: EncodedExamples) -> Iterator[Encoded]:
    """The longest end of a conversation that begins with a user's message, has an answer, and fits."""
    head = [message for message in example.messages[:1] if message["role"] == "system"]
    turns = example.messages[len(head) :]
    for start in range(1, len(turns)):
        kept = turns[start:]
        if kept[0]["role"] != "user" or all(message["role"] != "assistant" for message in kept):
            continue
        encoded = encode_example(tokenizer, ChatExample(example.location, (*head, *kept)))
        if len(encoded.ids) <= limit:
            result.untrained_turns += sum(message["role"] == "assistant" for message in turns[:start])
            yield encoded
            return


def _latest_prompt(tokenizer: Tokenizer, example: PreferenceExample, limit: int) -> list[Encoded]:
    """A pair after the longest end of its prompt that begins with a user's message, such that both sides fit."""
    assert not isinstance(example.prompt, str)
    head = [message for message in example.prompt[:1] if message["role"] == "system"]
    for start in range(len(head) + 1, len(example.prompt)):
        if example.prompt[start]["role"] != "user":
            continue
        pair = encode_pair(tokenizer, replace(example, prompt=(*head, *example.prompt[start:])))
        if all(len(side.ids) <= limit for side in pair):
            return pair
    return []


def split_answer(encoded: Encoded) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """An example before its last trained part, and that part with the token that ends it."""
    end = int(np.flatnonzero(encoded.trained)[-1]) + 1
    untrained = np.flatnonzero(~encoded.trained[:end])
    start = int(untrained[-1]) + 1
    return encoded.ids[:start], encoded.ids[start:end]
