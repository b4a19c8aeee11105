"""Text of a given form: whatever a model with random weights would rather write."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate  # type: ignore[import-untyped]

from config.errors import UserError
from config.load import load_config, with_vocab_size
from data.tokenization import Tokenizer
from inference.constraints import Constraint, json_object, json_schema, regex
from inference.engine import Engine, Piece, Request
from inference.sampling import SamplingSettings
from model.transformer import Transformer
from tests.workspace import LIVELY, SMALL, small_tokenizer

UNIGRAM = ("data.tokenizer.kind=sentencepiece-unigram", "data.tokenizer.encoder=auto", "data.tokenizer.vocab_size=340")
TOKENIZERS = {"bpe": small_tokenizer(), "sentencepiece-unigram": small_tokenizer(*UNIGRAM)}


def make_model(tokenizer: Tokenizer) -> Transformer:
    config = with_vocab_size(load_config([], [*SMALL, *LIVELY, "model.context_length=512"]), tokenizer.vocab_size)
    return Transformer(config.model).eval()


MODELS = {kind: make_model(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


def write(kind: str, *requests: Request) -> list[tuple[str, Any]]:
    """Text and finish of every request."""
    pieces: list[list[Piece]] = [[] for _ in requests]
    for piece in Engine(MODELS[kind], TOKENIZERS[kind], slots=2).generate(requests):
        pieces[piece.sequence].append(piece)
    return [("".join(piece.text for piece in each), each[-1].finish) for each in pieces]


def request(constraint: Constraint | None, seed: int = 0, temperature: float = 1.0, **more: Any) -> Request:
    return Request([20, 30, 40], 500, SamplingSettings(temperature), seed, constraint=constraint, **more)


leaves = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 1200},
        {"type": "string", "maxLength": 4},
        {"enum": ["Zwölf", 7, "😀", None]},
        {"type": "string", "pattern": "^[а-я]{2,3}$"},
        {"const": {"x": [1]}},
    ]
)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "größe", "b c"]), inner, min_size=1, max_size=3)
    objects = properties.map(
        lambda found: {
            "type": "object",
            "properties": found,
            "required": list(found)[:1],
            "additionalProperties": False,
        }
    )
    arrays = inner.map(lambda found: {"type": "array", "items": found, "maxItems": 2})
    return objects | arrays | st.lists(inner, min_size=1, max_size=2).map(lambda found: {"anyOf": found})


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.recursive(leaves, grown, max_leaves=4), st.sampled_from([0.0, 1.0, 3.0]), st.integers(0, 100))
def test_every_text_is_json_of_its_schema(kind: str, schema: dict[str, Any], temperature: float, seed: int) -> None:
    ((text, finish),) = write(kind, request(json_schema(schema, TOKENIZERS[kind]), seed, temperature))
    assert finish == "stop"
    validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_forms_of_a_ragged_batch_stay_apart(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    requests = [
        request(regex("[0-9]{4}-[0-9]{2}", tokenizer), 1, stop_tokens=[9]),
        request(None, 2, stop=["e"]),
        request(regex("(да|нет|😀){3}", tokenizer), 3, logprobs=2),
        request(json_schema({"type": "string", "maxLength": 9}, tokenizer), 4, 0.0),
    ]
    found = write(kind, *requests)
    assert found == [write(kind, each)[0] for each in requests]
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", found[0][0]) and re.fullmatch("(да|нет|😀){3}", found[2][0])
    assert isinstance(json.loads(found[3][0]), str)


def test_the_text_may_end_exactly_where_its_form_is_complete() -> None:
    tokenizer = TOKENIZERS["bpe"]
    constraint = regex("ab(cd)?", tokenizer)
    allowed = []
    progress = constraint.begin()
    for token in tokenizer.encode("abcd"):
        allowed.append(ends(progress, tokenizer))
        progress.push(token)
    assert allowed[0] is False and progress.ended
    texts = {write("bpe", request(constraint, seed, 5.0))[0][0] for seed in range(12)}
    assert texts == {"ab", "abcd"}


def ends(progress: Any, tokenizer: Tokenizer) -> bool:
    bits = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
    progress.fill(bits)
    return bool(bits[tokenizer.end_of_text_id // 32] >> tokenizer.end_of_text_id % 32 & 1)


def test_a_stop_string_ends_a_form_too() -> None:
    constraint = regex("[0-9]{5}x[0-9]{5}", TOKENIZERS["bpe"])
    ((text, finish),) = write("bpe", request(constraint, stop=["x"]))
    assert re.fullmatch("[0-9]{5}", text) and finish == "stop"


def test_what_cannot_be_is_refused_by_name() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert json_object(tokenizer)
    for schema, message in (
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {"type": "string"}}, "not"),
        ("{", "is no JSON"),
        ("[1]", "must be an object"),
    ):
        with pytest.raises(UserError, match=message):
            json_schema(schema, tokenizer)
    with pytest.raises(UserError, match=r"The regular expression '\(' cannot be used"):
        regex("(", tokenizer)
