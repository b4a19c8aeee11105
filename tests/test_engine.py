"""The engine: a cache that changes nothing, batches that change nothing, and text that ends where it should."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config.errors import UserError
from config.load import load_config, with_vocab_size
from inference.engine import Engine, Piece, QueueFull, Request
from inference.prompting import make_requests, sample_text
from inference.sampling import BatchSettings, SamplingSettings, choose, uniform
from inference.text import Detokenizer, StopStrings
from model.transformer import Transformer
from tests.workspace import LIVELY, SMALL, TEXTS, small_tokenizer

TOKENIZER = small_tokenizer()
CONTEXT = 32
KINDS = {
    "rope, grouped queries": ["model.n_heads=4", "model.n_kv_heads=2"],
    "as GPT-2": ["model.position=learned", "model.norm=layernorm", "model.activation=gelu", "model.bias=true"]
    + ["model.tie_embeddings=true", "model.qk_norm=false"],
    "wide heads": ["model.n_heads=3", "model.n_kv_heads=1", "model.d_head=20"],
    "windows and skips": ["model.n_layers=3", "model.window=5", "model.window_pattern=SL", "model.logit_soft_cap=3.0"]
    + ["model.value_embeddings=alternate", "model.residual_scaling=true"],
}


def make_model(kind: str) -> Transformer:
    config = with_vocab_size(load_config([], [*SMALL, *LIVELY, *KINDS[kind]]), TOKENIZER.vocab_size)
    return Transformer(config.model).eval()


MODELS = {kind: make_model(kind) for kind in KINDS}
MODEL = MODELS["rope, grouped queries"]
LONG = TOKENIZER.encode(TEXTS[0] + TEXTS[1])


def run(requests: Sequence[Request], slots: int = 1, model: Transformer = MODEL) -> list[tuple[list[int], str, Any]]:
    """Tokens, text and finish of every request."""
    results: list[tuple[list[int], str, Any]] = [([], "", None) for _ in requests]
    for piece in Engine(model, TOKENIZER, slots).generate(requests):
        tokens, text, finish = results[piece.sequence]
        assert finish is None, "a piece after the last one"
        results[piece.sequence] = ([*tokens, piece.token], text + piece.text, piece.finish)
    return results


def uncached(model: Transformer, request: Request) -> list[int]:
    """The tokens of `request` from whole forward passes over the window, up to the end of text."""
    ids = list(request.prompt)
    batch = BatchSettings([request.sampling])
    for step in range(request.max_new_tokens):
        start = 0
        while len(ids) - start > CONTEXT:
            start += CONTEXT // 2
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:]]))[:, -1]
        present = torch.zeros_like(logits, dtype=torch.bool)
        present[0, ids] = True
        counts = torch.bincount(torch.tensor(ids[len(request.prompt) :]).long(), minlength=logits.shape[1])[None]
        number = torch.tensor([uniform(request.seed, step)], dtype=torch.float64)
        token = choose(logits, batch, number, present, counts)
        ids.append(int(token))
        if token == TOKENIZER.end_of_text_id:
            break
    return ids[len(request.prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_cached_generation_equals_uncached_generation(kind: str, length: int) -> None:
    """Prompts below, at and beyond the context of 32 tokens, and texts that outgrow it."""
    for sampling in (SamplingSettings(temperature=0.0), SamplingSettings(0.9, 50, 0.95, 0.01, 1.2, 0.9, 1, 0.4)):
        request = Request(LONG[:length], 60, sampling, seed=length)
        assert run([request], model=MODELS[kind])[0][0] == uncached(MODELS[kind], request)


requests_of_all_kinds = st.builds(
    Request,
    prompt=st.integers(0, 40).map(lambda length: LONG[length : 2 * length]),
    max_new_tokens=st.integers(1, 40),
    sampling=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        top_k=st.sampled_from([0, 3, 50]),
        top_p=st.sampled_from([0.5, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        typical_p=st.sampled_from([0.7, 1.0]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        logit_bias=st.sampled_from([(), ((40, 3.0), (7, -100.0))]),
    ),
    seed=st.integers(-(2**70), 2**70),
    stop=st.lists(st.sampled_from(["e", "th", "\n", "х"]), max_size=2),
    stop_tokens=st.lists(st.integers(0, 299), max_size=2),
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(requests_of_all_kinds, min_size=1, max_size=6), st.integers(1, 4))
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(requests: list[Request], slots: int) -> None:
    assert run(requests, slots) == [run([request])[0] for request in requests]


def computed(requests: Sequence[Request], slots: int) -> int:
    engine = Engine(MODEL, TOKENIZER, slots)
    list(engine.generate(requests))
    return engine.computed_tokens


def test_penalties_stay_with_their_sequence_as_others_come_and_go() -> None:
    """The counts of a sequence follow it from batch to batch."""
    settings = [SamplingSettings(0.8, repetition_penalty=1.5), SamplingSettings(0.8, frequency_penalty=2.0)]
    settings += [SamplingSettings(0.8), SamplingSettings(0.8, presence_penalty=2.0, repetition_penalty=1.2)]
    requests = [Request(LONG[:5], 3 + 7 * n, each, n) for n, each in enumerate([*settings, *settings[::-1]])]
    for (tokens, _, _), request in zip(run(requests, slots=3), requests, strict=True):
        assert tokens == uncached(MODEL, request)


def test_a_bias_bans_and_forces_tokens() -> None:
    forced = SamplingSettings(logit_bias=((77, 100.0), (5, -100.0)))
    assert run([Request(LONG[:5], 6, forced)])[0][0] == [77] * 6
    with pytest.raises(UserError, match="there is no token 300; this vocabulary has 0 to 299"):
        Engine(MODEL, TOKENIZER).submit(Request(LONG[:5], 6, SamplingSettings(logit_bias=((300, 1.0),))))


def test_log_probabilities_are_those_of_the_model_and_come_only_where_asked() -> None:
    """Of the model's own distribution, whatever temperature, penalties and filters do."""
    sampling = SamplingSettings(temperature=2.0, top_k=40, frequency_penalty=1.0)
    asked: list[int | None] = [3, None, 0, 1000]
    requests = [Request(LONG[: 4 + n], 8, sampling, n, logprobs=count) for n, count in enumerate(asked)]
    pieces: list[list[Piece]] = [[] for _ in requests]
    for piece in Engine(MODEL, TOKENIZER, slots=3).generate(requests):
        pieces[piece.sequence].append(piece)
    for request, of_request in zip(requests, pieces, strict=True):
        assert [piece.token for piece in of_request] == run([replace(request, logprobs=None)])[0][0]
        ids = list(request.prompt)
        for piece in of_request:
            if request.logprobs is None:
                assert piece.logprobs is None
                continue
            with torch.no_grad():
                expected = MODEL(torch.tensor([ids]))[0, -1].log_softmax(-1)
            found = piece.logprobs
            assert found is not None and len(found.top) == min(request.logprobs, TOKENIZER.vocab_size)
            assert found.logprob == pytest.approx(float(expected[piece.token]), abs=1e-4)
            # Tokens as likely as each other but for rounding may stand in either order.
            tokens, values = zip(*found.top, strict=True) if found.top else ((), ())
            assert len(set(tokens)) == len(tokens) and list(values) == sorted(values, reverse=True)
            assert list(values) == pytest.approx(expected.topk(len(tokens)).values.tolist(), abs=1e-4)
            assert list(values) == pytest.approx(expected[list(tokens)].tolist(), abs=1e-4)
            ids.append(piece.token)


def test_a_model_with_more_logits_than_tokens_writes_tokens() -> None:
    config = load_config([], [*SMALL, *LIVELY, "model.vocab_size=400"])
    tokens = run([Request(LONG[:5], 100, SamplingSettings(5.0), logprobs=2)], model=Transformer(config.model).eval())
    assert max(tokens[0][0]) < TOKENIZER.vocab_size


def test_samples_of_one_prompt_share_its_prefill_and_nothing_else() -> None:
    sampling = SamplingSettings(temperature=1.5)
    requests = [Request(LONG[:9], 20, sampling, seed) for seed in range(4)] + [Request(LONG[:4], 20, sampling, 1)]
    together = run(requests, slots=5)
    assert together == [run([request])[0] for request in requests]
    assert len({text for _, text, _ in together}) == 5
    shared = 3 * 8  # all but the last token of the same prompt
    assert computed(requests, slots=5) == sum(computed([request], slots=1) for request in requests) - shared


def test_requests_beyond_the_slots_wait_and_cancelled_ones_free_their_slot() -> None:
    engine = Engine(MODEL, TOKENIZER, slots=2)
    numbers = [engine.submit(Request(LONG[: 3 + n], 10, SamplingSettings(), n)) for n in range(4)]
    assert {piece.sequence for piece in engine.step()} == set(numbers[:2])
    engine.cancel(numbers[0])
    pieces = engine.step()
    assert {piece.sequence for piece in pieces} == set(numbers[1:3])
    engine.cancel(numbers[3])
    tokens: dict[int, list[int]] = {numbers[1]: [], numbers[2]: []}
    while engine.busy:
        for piece in engine.step():
            tokens[piece.sequence].append(piece.token)
    assert tokens[numbers[1]] == run([Request(LONG[:4], 10, SamplingSettings(), 1)])[0][0][2:]
    assert tokens[numbers[2]] == run([Request(LONG[:5], 10, SamplingSettings(), 2)])[0][0][1:]


def test_closing_the_iterator_cancels_the_rest() -> None:
    engine = Engine(MODEL, TOKENIZER, slots=1)
    pieces = engine.generate([Request(LONG[:5], 10), Request(LONG[:6], 10)])
    next(pieces)
    assert engine.busy
    pieces.close()
    assert not engine.busy


def test_end_of_text_and_stop_tokens_end_a_sample_without_showing() -> None:
    request = Request(LONG[:5], 3000, SamplingSettings(temperature=3.0), seed=1)
    ((tokens, text, finish),) = run([request])
    assert finish == "stop" and tokens.count(TOKENIZER.end_of_text_id) == 1
    assert tokens[-1] == TOKENIZER.end_of_text_id
    assert text == TOKENIZER.decode(tokens[:-1], skip_special_tokens=True)

    other = next(token for token in tokens if TOKENIZER.token_bytes()[token] > 0)
    ((stopped, text, finish),) = run([Request(LONG[:5], 3000, SamplingSettings(temperature=3.0), 1, (), [other])])
    assert finish == "stop" and stopped == tokens[: tokens.index(other) + 1]
    assert text == TOKENIZER.decode(stopped[:-1], skip_special_tokens=True)


def test_ctrl_c_at_any_moment_leaves_an_engine_that_writes_as_before() -> None:
    """Also where several threads share a step, and would wait for ever for one that was interrupted."""
    process = multiprocessing.get_context("spawn").Process(target=interrupt_often)
    process.start()
    process.join(300)
    waits = process.is_alive()
    process.kill()
    process.join()
    assert not waits and process.exitcode == 0


def interrupt_often() -> None:
    """Interrupt an engine at other moments again and again; fails where it does not write as before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request, short = Request(LONG[:20], max_new_tokens=400), Request(LONG[:20], max_new_tokens=8)
    torch.set_num_threads(2)
    engine = Engine(MODEL, TOKENIZER)
    expected = [piece.token for piece in engine.generate([short])]
    main, interrupted, written = threading.main_thread().ident, 0, 0
    assert main is not None
    for attempt in range(12):
        timer = threading.Timer(0.001 + 0.001 * attempt, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while True:
                for _ in engine.generate([request]):
                    written += 1
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert not engine.busy
        assert [piece.token for piece in engine.generate([short])] == expected
    assert interrupted == 12 and written > 0


def test_max_new_tokens_is_exact() -> None:
    for limit in (1, 7):
        ((tokens, _, finish),) = run([Request(LONG[:5], limit, SamplingSettings(temperature=0.0))])
        assert (len(tokens), finish) == (limit, "length")


def test_the_text_is_that_of_the_tokens_and_every_piece_is_whole_characters() -> None:
    """Random weights write many bytes that are no UTF-8, and the pieces joined are still what decoding gives."""
    request = Request(LONG[:5], 400, SamplingSettings(temperature=1.0), seed=3)
    ((tokens, text, _),) = run([request])
    tokens = [token for token in tokens if token != TOKENIZER.end_of_text_id]
    assert "\N{REPLACEMENT CHARACTER}" in text
    assert text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece-unigram"])
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
@settings(max_examples=100, deadline=None)
def test_streamed_text_never_holds_a_part_of_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZER if kind == "bpe" else SENTENCEPIECE
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text)
    shown = ""
    for token in ids:
        shown += detokenizer.push(token)
        assert tokenizer.decode(ids).startswith(shown)
    assert shown + detokenizer.flush() == tokenizer.decode(ids)


SENTENCEPIECE = small_tokenizer(
    "data.tokenizer.kind=sentencepiece-unigram", "data.tokenizer.encoder=auto", "data.tokenizer.vocab_size=340"
)


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER.encode("a😀")
    assert len(ids) > 2
    assert [detokenizer.push(token) for token in ids[:-1]] == ["a"] + [""] * (len(ids) - 2)
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    expected, stopped = text, False
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            expected, stopped = text[: end - max(map(len, found))], True
            break
    filter_ = StopStrings(stops)
    shown = ""
    while text:
        size = data.draw(st.integers(1, len(text)))
        shown += filter_.push(text[:size])
        assert expected.startswith(shown)
        text = text[size:]
    assert filter_.stopped == stopped
    assert shown + filter_.flush() == expected


def test_a_stop_string_across_tokens_ends_the_sample_before_it() -> None:
    plain = Request(LONG[:5], 60, SamplingSettings(temperature=0.8), seed=5)
    ((tokens, text, _),) = run([plain])
    stop = text[20:26]
    assert all(stop not in TOKENIZER.decode([token]) for token in tokens)
    ((stopped, shortened, finish),) = run([Request(plain.prompt, 60, plain.sampling, 5, (stop,))])
    assert finish == "stop" and len(stopped) < len(tokens)
    assert shortened == text[: text.index(stop)]


def test_text_held_back_for_a_stop_string_that_never_came_is_shown_at_the_end() -> None:
    plain = Request(LONG[:5], 30, SamplingSettings(temperature=0.8), seed=5)
    ((_, text, _),) = run([plain])
    ((_, same, finish),) = run([Request(plain.prompt, 30, plain.sampling, 5, (text[-4:] + "never",))])
    assert (same, finish) == (text, "length")


def test_weights_that_are_no_numbers_are_named() -> None:
    broken = make_model("as GPT-2")
    with torch.no_grad():
        broken.output_weight[5] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        run([Request([1, 2, 3], 5)], model=broken)


def test_sample_text_disturbs_neither_random_state_nor_mode() -> None:
    config = load_config([], ["generation.max_new_tokens=12", "generation.stop=[]"]).generation
    model = Transformer(MODEL.config.model_copy(update={"dropout": 0.5}))
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    text = sample_text(model, TOKENIZER, "The quick", config, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert text == sample_text(model, TOKENIZER, "The quick", config, seed=4)
    assert text != sample_text(model, TOKENIZER, "The quick", config, seed=5)
    assert text.startswith("The quick") and len(text) > len("The quick")


def test_requests_follow_the_settings() -> None:
    config = load_config([], ["generation.num_samples=3", "generation.temperature=0.5", "generation.stop=[x]"])
    requests = make_requests(config.generation, [1, 2], 10, [4])
    assert [request.seed for request in requests] == [10, 11, 12]
    assert all(request.sampling.temperature == 0.5 and request.stop == ("x",) for request in requests)
    assert all(request.stop_tokens == (4,) and request.prompt == [1, 2] for request in requests)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    engine = Engine(MODEL, TOKENIZER, slots=1, queue_limit=2)
    numbers = [engine.submit(Request(LONG[:4], 5)) for _ in range(3)]  # one for the slot, two that wait
    with pytest.raises(QueueFull, match="waiting"):
        engine.submit(Request(LONG[:4], 5))
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(Request(LONG[:4], 5))
    engine.cancel(numbers[0])
    assert engine.submit(Request(LONG[:4], 5)) == 3
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("length", [1, 20, 31])
def test_a_context_that_stops_ends_the_text_where_it_is_full(length: int) -> None:
    sampling = SamplingSettings(temperature=0.8)
    sliding = run([Request(LONG[:length], 50, sampling)])[0]
    ((tokens, text, finish),) = run([Request(LONG[:length], 50, sampling, context="stop")])
    assert (tokens, finish) == (sliding[0][: CONTEXT - length], "length")
    assert sliding[1].startswith(text)
    with pytest.raises(UserError, match="32"):
        run([Request(LONG[:32], 1, context="stop")])


WIDE = Transformer(
    with_vocab_size(
        load_config([], [*SMALL, *LIVELY, "model.n_kv_heads=1", "model.context_length=700"]), TOKENIZER.vocab_size
    ).model
).eval()
MANY = (LONG * 4)[:1400]


def test_a_long_prompt_does_not_keep_others_from_writing() -> None:
    engine = Engine(WIDE, TOKENIZER, slots=2)
    writing = engine.submit(Request(LONG[:4], 20, SamplingSettings(temperature=0.8)))
    engine.step()
    reading = engine.submit(Request(MANY[:690], 2, SamplingSettings(temperature=0.8)))
    seen = [{piece.sequence for piece in engine.step()} for _ in range(4)]
    assert seen == [{writing}, {writing}, {writing, reading}, {writing, reading}]


turn = st.tuples(st.integers(0, 40) | st.just(len(LONG)), st.integers(1, 690) | st.sampled_from([256, 512]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(turn, min_size=1, max_size=5), st.integers(1, 3))
@example([(len(LONG), 600), (len(LONG), 256)], 1)
@example([(len(LONG), 690), (len(LONG), 256), (len(LONG), 512)], 2)
def test_what_a_row_still_holds_changes_no_token(prompts: list[tuple[int, int]], slots: int) -> None:
    """Prompts that share beginnings, or are one, over the borders of the blocks, one after another and together."""
    sampling = SamplingSettings(temperature=1.2)
    requests = [
        Request(MANY[:length] + LONG[other : other + 3], 8, sampling, seed)
        for seed, (other, length) in enumerate(prompts)
    ]
    alone = [run([request], model=WIDE)[0] for request in requests]
    assert run(requests, slots, WIDE) == alone
    engine = Engine(WIDE, TOKENIZER, slots)
    for request, expected in zip(requests, alone, strict=True):
        assert [piece.token for piece in engine.generate([request])] == expected[0]


def test_the_next_turn_of_a_conversation_computes_what_is_new() -> None:
    engine = Engine(WIDE, TOKENIZER, slots=2)
    prompt = LONG[:120]
    answer = [piece.token for piece in engine.generate([Request(prompt, 10, SamplingSettings(temperature=0.8))])]
    before = engine.computed_tokens
    assert before == 120 + len(answer) - 1
    list(engine.generate([Request([*prompt, *answer, *LONG[:20]], 1)]))
    assert engine.computed_tokens - before == 21
