"""The generation engine: many sequences of different lengths, settings and ends, decoded together on one KV cache.

A sequence is *submitted* and waits for a free row of the cache; then its prompt is run through the model, and its first
token drawn; every later step *decodes* one token of all running sequences together, and more of one whose next tokens
were guessed (see `lookup`). Sequences join and leave between steps. What a step runs is decided in `slots`.

What a sequence draws depends on its own tokens, settings and seed, not on what it is batched with: on a CPU to the last
bit, elsewhere but for the rounding of matrix products, which may depend on the size of the batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from config.errors import UserError
from inference.choosing import Chooser, Past, TokenLogprobs, check_numbers
from inference.constraints import Constraint
from inference.interrupts import uninterrupted
from inference.lookup import Lookup, allot
from inference.sampling import SamplingSettings
from inference.slots import Slot, Slots
from inference.text import FinishReason, Writing
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue. An empty prompt begins a new document.

    Generation ends after `max_new_tokens`, at the end-of-text token, at one of `stop_tokens`, or at a text of `stop`.
    When the text fills the model's context, it goes on with the newest part of it, or ends if `context` is "stop".
    With `logprobs`, every piece tells what the model thought of its token, and of that many likeliest ones. With a
    `constraint` the text keeps to its form, and also ends where nothing may follow. An `answer` is a text of its own,
    not the rest of one: some imported tokenizers put a space in front of a text, which is then no part of it. Up to
    `prompt_lookup_tokens` of what may follow, by what is in prompt and text, are run along in a step where that is
    likely to save some.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingSettings = SamplingSettings()
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    context: Literal["slide", "stop"] = "slide"
    logprobs: int | None = None
    constraint: Constraint | None = None
    answer: bool = False
    prompt_lookup_tokens: int = 0

    def begin(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens to go on from: the prompt, or what begins a document."""
        return list(self.prompt) or [*tokenizer.prefix_ids] or [tokenizer.end_of_text_id]

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end the text."""
        return frozenset((*tokenizer.ending_ids, *self.stop_tokens))

    def check_room(self, tokens: int, context_length: int) -> None:
        """Raise `UserError` where a prompt of so many tokens leaves a text which must not slide no room."""
        if self.context == "stop" and tokens >= context_length:
            raise UserError(
                f"The prompt has {tokens:,} tokens; the model sees {context_length:,} at once, the answer included."
            )

    def writing(self, tokenizer: Tokenizer) -> Writing:
        """The text, with nothing written yet."""
        return Writing(tokenizer, self.stop, self.ends(tokenizer), self.is_own_text(tokenizer))

    def is_own_text(self, tokenizer: Tokenizer) -> bool:
        """Whether the text is an answer, or its prompt has no text; one that must have a form is left as it is."""
        return self.constraint is None and (self.answer or set(self.prompt) <= set(tokenizer.special_tokens.values()))


class QueueFull(UserError):
    """More requests wait than the engine takes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step gave one sequence: a token, and the text that is certain since then (maybe none).

    The texts of a sequence joined are the text of its tokens up to the stop string or token. `finish` is None until the
    last piece: "stop" for a stop string or token, "length" for `max_new_tokens` or a full context, "error" where the
    form that it was to have could not be followed, which `failure` tells more of.
    """

    sequence: int
    token: int
    text: str
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None
    failure: str | None = None


@dataclass(slots=True, eq=False)
class _Sequence:
    number: int
    request: Request
    ids: list[int]
    writing: Writing
    past: Past
    lookup: Lookup | None
    slot: Slot | None = None


class Engine:
    """Runs up to `slots` sequences at once; further ones wait their turn, no more than `queue_limit` if there is one.

    The model must be in evaluation mode; its device and dtype are those of the cache. With `compiled`, its steps go
    through torch.compile, which takes a minute at first, and run no guesses. `proposed_tokens` counts the guesses that
    were run so far, `accepted_tokens` those of them that were right.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        slots: int = 1,
        queue_limit: int | None = None,
        compiled: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        weight = model.token_embedding.weight
        # Sampling needs float64 and 64-bit integers, which Apple's GPUs lack.
        self._sampling_device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        self._slots, self._queue_limit = Slots(model, slots, compiled), queue_limit
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._submitted = 0
        self.proposed_tokens = self.accepted_tokens = 0
        self._chooser: Chooser | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._running or self._waiting)

    @property
    def slots(self) -> int:
        """How many sequences run at once."""
        return self._slots.rows

    @property
    def computed_tokens(self) -> int:
        """How many tokens went through the model so far."""
        return self._slots.computed

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number that its pieces carry.

        Raises `QueueFull` where too many wait, and `UserError` for a prompt that leaves a text which must not slide no
        room, or a bias of tokens that are none.
        """
        ids = request.begin(self._tokenizer)
        request.check_room(len(ids), self._model.config.context_length)
        if self._queue_limit is not None and len(self._waiting) - self._slots.free >= self._queue_limit:
            raise QueueFull(f"{len(self._waiting):,} requests are waiting already. Try again later.")
        looks_up = request.prompt_lookup_tokens > 0 and math.isfinite(self._slots.token_cost)
        sequence = _Sequence(
            number=self._submitted,
            request=request,
            ids=ids,
            writing=request.writing(self._tokenizer),
            past=Past(request, ids, self._tokenizer.vocab_size, self._sampling_device),
            lookup=Lookup(ids) if looks_up else None,
        )
        self._waiting.append(sequence)
        self._submitted += 1
        return sequence.number

    def cancel(self, number: int) -> None:
        """Forget a sequence, and free its slot; nothing happens if it has finished."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        for sequence in self._running:
            if sequence.number == number:
                self._release(sequence)
                return

    def generate(self, requests: Sequence[Request]) -> Generator[Piece, None, None]:
        """Submit `requests` and yield their pieces as they come; `Piece.sequence` is the index into `requests`.

        Closing the iterator cancels what is unfinished.
        """
        index = {self.submit(request): place for place, request in enumerate(requests)}
        try:
            while self.busy:
                for piece in self.step():
                    if piece.sequence in index:
                        yield replace(piece, sequence=index[piece.sequence])
        finally:
            for number in index:
                self.cancel(number)

    @uninterrupted
    def step(self) -> list[Piece]:
        """A token for every running sequence whose prompt is through, or several where they were guessed.

        Waiting sequences join as far as there is room. Ctrl-C takes effect when the step is done.
        """
        while self._waiting and self._slots.free:
            sequence = self._waiting.popleft()
            sequence.slot = self._slots.take(sequence.ids)
            self._running.append(sequence)
        self._guess()
        slots, logits = self._slots.step()
        if not slots or logits is None:
            return []
        owners = {id(sequence.slot): sequence for sequence in self._running}
        ready = [owners[id(slot)] for slot in slots]
        if any(sequence.past.drawn == 0 for sequence in ready):
            check_numbers(logits)
        self.proposed_tokens += sum(len(slot.guesses) for slot in slots)
        rows = accumulate((1 + len(slot.guesses) for slot in slots[:-1]), initial=0)
        due, pieces = list(zip(ready, rows, strict=True)), list[Piece]()
        while due:
            drawn = self._choose(due, logits)
            checked, due = due, []
            for (sequence, row), (token, logprobs) in zip(checked, drawn, strict=True):
                piece, guessed = self._accept(sequence, token, logprobs)
                pieces.append(piece)
                self.accepted_tokens += guessed
                if piece.finish is not None:
                    self._release(sequence)
                elif guessed:
                    due.append((sequence, row + 1))
        return pieces

    def _guess(self) -> None:
        """Propose what is worth it for the next step to run along."""
        looking = [(each, each.lookup) for each in self._running if each.lookup is not None and each.past.drawn]
        chances = [lookup.chance for _, lookup in looking]
        if not any(chances):
            return
        most = [
            min(each.request.prompt_lookup_tokens, each.request.max_new_tokens - each.past.drawn - 1)
            for each, _ in looking
        ]
        counts = allot(chances, most, len(self._running), self._slots.token_cost)
        for (sequence, lookup), count in zip(looking, counts, strict=True):
            if sequence.slot is not None:
                sequence.slot.guesses = lookup.guess(count)

    def _choose(self, due: Sequence[tuple[_Sequence, int]], logits: Tensor) -> list[tuple[int, TokenLogprobs | None]]:
        """The next tokens of sequences, each by its row of the logits; the one place in a step that waits for the
        device."""
        pasts, rows = [sequence.past for sequence, _ in due], [row for _, row in due]
        if self._chooser is None or not self._chooser.serves(pasts):
            self._chooser = Chooser(pasts, self._tokenizer.vocab_size, self._sampling_device)
        return self._chooser(logits if len(rows) == logits.shape[0] else logits[rows])

    def _accept(self, sequence: _Sequence, token: int, logprobs: TokenLogprobs | None) -> tuple[Piece, bool]:
        """Append a drawn token to its sequence; work out the text it makes certain, and whether it is the last.

        Also returns whether the token had been guessed, so that the next can be drawn.
        """
        assert sequence.slot is not None
        guessed = sequence.slot.append(token)
        if sequence.lookup is not None:
            sequence.lookup.push(token)
        text, finish = sequence.writing.push(token, sequence.past.ended, self._is_full(sequence))
        failure = sequence.past.failure
        finish = finish if failure is None else "error"
        return Piece(sequence.number, token, text, finish, logprobs, failure), guessed

    def _is_full(self, sequence: _Sequence) -> bool:
        limited = sequence.request.context == "stop" and len(sequence.ids) >= self._model.config.context_length
        return limited or sequence.past.drawn >= sequence.request.max_new_tokens

    def _release(self, sequence: _Sequence) -> None:
        """Free a running sequence's row."""
        self._running.remove(sequence)
        if sequence.slot is not None:
            self._slots.leave(sequence.slot)
