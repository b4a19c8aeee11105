"""Prompt look-up: fewer steps where a text repeats itself, and the same tokens everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lookup import Dictated
from config.errors import UserError
from config.load import load_config
from inference.constraints import regex
from inference.cpu import CPUModel
from inference.engine import Engine, Piece, Request
from inference.lookup import MATCH, Lookup, allot
from inference.prompting import check_beams, make_requests
from inference.sampling import SamplingSettings
from model.transformer import Transformer
from tests.test_engine import LONG, MODEL, MODELS, TOKENIZER, WIDE, requests_of_all_kinds

GREEDY = SamplingSettings(temperature=0.0)
SAYS_IT_AGAIN = SamplingSettings(temperature=0.5, repetition_penalty=0.5)


def write(engine: Engine, requests: Sequence[Request]) -> list[list[Piece]]:
    """The pieces of every request."""
    pieces: list[list[Piece]] = [[] for _ in requests]
    for piece in engine.generate(requests):
        pieces[piece.sequence].append(replace(piece, sequence=0))
    return pieces


def alone(request: Request, model: Transformer = MODEL) -> list[Piece]:
    """Its pieces without look-up and without company."""
    return write(Engine(model, TOKENIZER), [replace(request, prompt_lookup_tokens=0)])[0]


def dictated(prompt: list[int], text: list[int], **more: Any) -> Request:
    """A request that writes `text`, whatever the model thinks of it."""
    constraint = cast(Any, Dictated(text))
    return Request(prompt, len(text), constraint=constraint, prompt_lookup_tokens=7, **more)


looking_requests = st.builds(
    lambda request, copies, looks, other: replace(
        request, prompt=[*request.prompt] * copies, prompt_lookup_tokens=looks, **other
    ),
    requests_of_all_kinds,
    st.integers(1, 2),
    st.sampled_from([0, 1, 3, 7, 64]),
    st.fixed_dictionaries({}, optional={"sampling": st.sampled_from([GREEDY, SAYS_IT_AGAIN]), "logprobs": st.just(2)}),
)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(looking_requests, min_size=1, max_size=5), st.integers(1, 4))
def test_every_piece_is_the_one_without(kind: str, requests: list[Request], slots: int) -> None:
    """Of ragged batches, with other settings, seeds, ends and look-ups: tokens, texts, ends and log-probabilities."""
    assert write(Engine(MODELS[kind], TOKENIZER, slots), requests) == [alone(each, MODELS[kind]) for each in requests]


def test_a_text_that_repeats_itself_takes_few_steps_and_one_that_does_not_runs_nothing_along() -> None:
    engine = Engine(WIDE, TOKENIZER)
    request = dictated(LONG[:100], LONG[3:100])
    engine.submit(request)
    pieces = []
    steps = 0
    while engine.busy:
        pieces += engine.step()
        steps += 1
    assert [piece.token for piece in pieces] == LONG[3:100] and steps < 30
    assert [replace(piece, sequence=0) for piece in pieces] == alone(request, WIDE)
    assert engine.accepted_tokens == len(pieces) - steps
    assert engine.computed_tokens == 100 + steps - 1 + engine.proposed_tokens

    other = Engine(WIDE, TOKENIZER)
    write(other, [dictated(list(range(150)), list(range(150, 299)))])
    assert other.proposed_tokens == 0 and engine.proposed_tokens - engine.accepted_tokens < 10


@pytest.mark.parametrize("context", ["slide", "stop"])
def test_guesses_end_where_the_text_or_its_window_does(context: Any) -> None:
    """At many lengths of prompt, so that every number of guesses meets the end of the window or that of the text."""
    loop = [70, 71, 72]
    other = Request(LONG[:7], 12, SAYS_IT_AGAIN, prompt_lookup_tokens=2)
    expected = alone(other)
    for length in range(6, 23):
        request = dictated((loop * 11)[:length], (loop * 30)[length % 3 :][:33], context=context)
        engine = Engine(MODEL, TOKENIZER, slots=2)
        assert write(engine, [request, other]) == [alone(request), expected]
        assert engine.accepted_tokens > 4


def test_a_stop_in_the_middle_of_right_guesses_ends_the_text_there() -> None:
    text = TOKENIZER.decode(LONG[3:100])
    for stop in (text[60:66], text[61:62], text[100:110]):
        request = dictated(LONG[:100], LONG[3:100], stop=(stop,))
        engine = Engine(WIDE, TOKENIZER)
        [pieces] = write(engine, [request])
        assert pieces == alone(request, WIDE)
        assert pieces[-1].finish == "stop" and "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert engine.accepted_tokens > 0
    token = LONG[40]
    request = dictated(LONG[:100], LONG[3:100], stop_tokens=(token,))
    assert write(Engine(WIDE, TOKENIZER), [request])[0] == alone(request, WIDE)


def test_a_form_takes_up_nothing_that_was_not_drawn() -> None:
    """The guesses are those of other text, of which the form wants another end each time."""
    form = regex('("[ab]{3,4}", )*"c"', TOKENIZER)
    prompt = TOKENIZER.encode('"aab", "aab", "aab", "aab", ')
    requests = [
        Request(prompt, 60, SAYS_IT_AGAIN, seed, constraint=form, prompt_lookup_tokens=7, logprobs=1)
        for seed in range(6)
    ]
    engine = Engine(WIDE, TOKENIZER, slots=3)
    assert write(engine, requests) == [alone(request, WIDE) for request in requests]
    assert 0 < engine.accepted_tokens < engine.proposed_tokens


def test_a_row_left_amid_guesses_serves_the_next_turn() -> None:
    engine = Engine(WIDE, TOKENIZER)
    prompt = LONG[:60]
    for end in (11, 12, 13, 14, 15, 16):
        request = dictated(prompt, LONG[3 : 3 + end])
        [pieces] = write(engine, [request])
        assert pieces == alone(request, WIDE)
        before = engine.computed_tokens - engine.proposed_tokens
        prompt = [*prompt, *(piece.token for piece in pieces), *LONG[20:25]]
        follow = Request(prompt, 4, SAYS_IT_AGAIN)
        assert write(engine, [follow]) == [alone(follow, WIDE)]
        assert engine.computed_tokens - engine.proposed_tokens - before == 6 + 3, "only what is new is read"


@pytest.mark.parametrize("kind", MODELS)
def test_without_kernels_the_model_itself_checks_guesses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUModel, "takes", lambda model: False)
    loop = [70, 71, 72]
    requests = [dictated(LONG[: 8 + row] + loop * 2, loop * (4 + 2 * row), logprobs=0) for row in range(4)]
    requests.append(Request(LONG[:9], 30, GREEDY, prompt_lookup_tokens=3, logprobs=0))
    engine = Engine(MODELS[kind], TOKENIZER, slots=4)
    for request, pieces in zip(requests, write(engine, requests), strict=True):
        expected = alone(request, MODELS[kind])
        assert [(piece.token, piece.text, piece.finish) for piece in pieces] == [
            (piece.token, piece.text, piece.finish) for piece in expected
        ]
        values = [[piece.logprobs.logprob for piece in each if piece.logprobs] for each in (pieces, expected)]
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-3, atol=1e-3)
    assert engine.accepted_tokens > 10


def test_compiled_steps_run_no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their graphs have one token of each row. Compiling is left out here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    request = dictated(LONG[:60], LONG[3:30])
    engine = Engine(WIDE, TOKENIZER, compiled=True)
    [pieces] = write(engine, [request])
    assert [piece.token for piece in pieces] == LONG[3:30] and engine.proposed_tokens == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=25), st.integers(1, 9))
def test_what_is_guessed_followed_before(prompt: list[int], text: list[int], count: int) -> None:
    ids = list(prompt)
    lookup = Lookup(ids)
    for token in text:
        ids.append(token)
        lookup.push(token)
    guess = lookup.guess(count)
    places = [end for end in range(MATCH, len(ids)) if ids[end - MATCH : end] == ids[-MATCH:]]
    assert bool(guess) == bool(places)
    if guess:
        assert len(guess) == count
        assert any([*ids, *guess][end : end + count] == guess for end in places)


def test_a_chance_is_how_often_guesses_were_right() -> None:
    ids = [1, 2, 3, 4, 5, 6, 1, 2]
    lookup = Lookup(ids)
    assert lookup.chance == 0.0 and lookup.guess(5) == [3, 4, 5, 6, 1]
    seen = []
    for token in (3, 4, 5, 6, 1, 2, 9, 1, 2):
        ids.append(token)
        lookup.push(token)
        seen.append(lookup.chance)
    assert seen[:6] == sorted(seen[:6]) and seen[5] > 0.7
    assert seen[6:8] == [0.0, 0.0], "nothing to be guessed"
    assert 0.5 < seen[8] < seen[5] and lookup.guess(2) == [9, 1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([0.05, 0.1, 0.3, 1.0]),
)
def test_guesses_are_allotted_for_the_most_tokens_in_the_time(
    looking: list[tuple[float, int]], others: int, cost: float
) -> None:
    chances, most = [chance for chance, _ in looking], [count for _, count in looking]
    texts = len(looking) + others

    def rate(counts: Sequence[int]) -> float:
        gains = [chance**n for chance, count in zip(chances, counts, strict=True) for n in range(1, count + 1)]
        return (texts + sum(gains)) / (1 + cost * (texts - 1 + sum(counts)))

    counts = allot(chances, most, texts, cost)
    assert all(count <= limit for count, limit in zip(counts, most, strict=True))
    every = itertools.product(*(range(limit + 1) for limit in most))
    assert rate(counts) == pytest.approx(max(map(rate, every)), rel=1e-9)


def test_the_setting_reaches_the_engine_and_does_not_go_with_beams() -> None:
    config = load_config([], ["generation.prompt_lookup_tokens=5"]).generation
    assert make_requests(config, [1, 2], 0)[0].prompt_lookup_tokens == 5
    search = load_config([], ["generation.beams=2", "generation.prompt_lookup_tokens=5"]).generation
    with pytest.raises(UserError, match=r"prompt_lookup_tokens: a beam search checks no guesses, so 5 could"):
        check_beams(search)
