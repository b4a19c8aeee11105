"""Beam search: of all that a model could write, the likeliest texts that a search of limited width finds.

The `beams` likeliest unfinished texts are decoded together. Of all their continuations by one token the likeliest are
kept: those that end the text are finished, the others are the next unfinished ones. A finished text scores the sum of
the logarithms of its tokens' probabilities, divided by its number of tokens to the power of `length_penalty`, so 0
compares sums, which favours short texts, 1 compares means, and more favours long texts. These are the rules of
`transformers`, with the same outcome.

Each unfinished text has a row of the KV cache. The prompt is computed once. A text that goes on in one way keeps its
row; one that goes on in several ways gets further rows, of texts that were given up, into which only what differs is
copied: beams are young, and most have nearly all their tokens in common.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config.errors import UserError
from inference.choosing import check_bias, check_numbers
from inference.constraints import Progress, unpack
from inference.engine import Request
from inference.interrupts import uninterrupted
from inference.sampling import BatchSettings, adjust_logits
from inference.slots import Slot, Slots, window_start
from inference.text import FinishReason, Writing
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class Found:
    """A finished text, its tokens, and what it scores. `finish` is as that of `engine.Piece`."""

    tokens: tuple[int, ...]
    text: str
    score: float
    finish: FinishReason


@dataclass(slots=True, eq=False)
class _Beam:
    """An unfinished text; `total` is the sum of the logarithms of its tokens' probabilities."""

    slot: Slot
    writing: Writing
    progress: Progress | None
    text: str = ""
    total: float = 0.0


@dataclass(slots=True, eq=False)
class _Search:
    """The search for one request: what of it is unfinished, likeliest first, and the best that is finished."""

    place: int
    request: Request
    prompt: list[int]
    limit: int
    running: list[_Beam]
    finished: list[Found] = field(default_factory=list)
    written: int = 0  # tokens of each unfinished text


class BeamSearch:
    """Searches for up to `groups` requests at once, `beams` wide each.

    With `early_stopping` a search ends as soon as it has `beams` finished texts, else when none that is unfinished
    scores better than the worst of them by now. The model must be in evaluation mode; `compiled` as in `Engine`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        beams: int,
        groups: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        compiled: bool = False,
    ) -> None:
        self._tokenizer, self._context = tokenizer, model.config.context_length
        self._beams, self._length_penalty, self._early_stopping = beams, length_penalty, early_stopping
        self._slots = Slots(model, beams * groups, compiled)
        self._groups = groups

    def search(self, requests: Sequence[Request]) -> list[list[Found]]:
        """Up to `beams` texts for every request, best first.

        Bias, penalties, ends and the form of a request hold; what belongs to drawing (seed, temperature and filters)
        plays no part, nor do `logprobs`. A text ends where the model's context is full.
        """
        waiting = deque(enumerate(requests))
        active: list[_Search] = []
        results: list[list[Found]] = [[] for _ in requests]
        try:
            while waiting or active:
                while waiting and len(active) < self._groups:
                    active.append(self._begin(*waiting.popleft()))
                self._step(active)
                for search in [search for search in active if not search.running]:
                    active.remove(search)
                    results[search.place] = search.finished
        finally:
            for search in active:
                self._move(search, [])
        return results

    def _begin(self, place: int, request: Request) -> _Search:
        check_bias(request.sampling.logit_bias, self._tokenizer.vocab_size)
        ids = request.begin(self._tokenizer)
        request.check_room(len(ids), self._context)
        ids = ids[window_start(len(ids) + 1, self._context) :]
        limit = min(request.max_new_tokens, self._context - len(ids))
        progress = None if request.constraint is None else request.constraint.begin()
        beam = _Beam(self._slots.take(list(ids)), request.writing(self._tokenizer), progress)
        return _Search(place, request, ids, limit, [beam])

    @uninterrupted
    def _step(self, active: Sequence[_Search]) -> None:
        slots, logits = self._slots.step()
        rows = {id(slot): row for row, slot in enumerate(slots)}
        for search in active:
            own = [rows[id(beam.slot)] for beam in search.running if id(beam.slot) in rows]
            if own and logits is not None:
                self._extend(search, self._totals(search, logits[own]))

    def _totals(self, search: _Search, logits: Tensor) -> Tensor:
        """`(unfinished, vocab)` float64: what each unfinished text would sum up to with each token after it."""
        size, device = self._tokenizer.vocab_size, logits.device
        sampling, running = search.request.sampling, search.running
        logits = logits[:, :size].float()
        if search.written == 0:
            check_numbers(logits)
        present = counts = None
        if sampling.penalizes_repetition or sampling.counts_tokens:
            ids = torch.tensor([beam.slot.ids for beam in running], device=device)
            present = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
            written = ids[:, len(search.prompt) :]
            counts = torch.zeros_like(logits).scatter_add_(1, written, torch.ones_like(written, dtype=logits.dtype))
        settings = BatchSettings([sampling] * len(running), device)
        scores = adjust_logits(logits, settings, present, counts).log_softmax(dim=-1).cpu().double()
        if search.request.constraint is not None:
            bits = torch.zeros(len(running), -(-size // 32), dtype=torch.int32)
            for row, beam in zip(bits, running, strict=True):
                if beam.progress is not None:
                    beam.progress.fill(row)
            scores = scores.masked_fill(~unpack(bits, size), -torch.inf)
        return scores + torch.tensor([beam.total for beam in running], dtype=torch.float64)[:, None]

    def _extend(self, search: _Search, totals: Tensor) -> None:
        """Go on by a token: sort the likeliest continuations into finished and unfinished ones."""
        size, ends = totals.shape[1], len(search.request.ends(self._tokenizer))
        best = totals.flatten().topk(min(totals.numel(), (1 + ends) * self._beams))
        search.written += 1
        going_on: list[tuple[int, int, _Beam]] = []
        for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if total == -torch.inf or len(going_on) == self._beams:
                break
            row, token = divmod(index, size)
            beam, finish = self._follow(search, search.running[row], token, total)
            if finish is None:
                going_on.append((row, token, beam))
            elif rank < self._beams:
                tokens = (*beam.slot.ids[len(search.prompt) :], token)
                search.finished.append(Found(tokens, beam.text, self._score(total, search.written), finish))
        search.finished = sorted(search.finished, key=lambda found: -found.score)[: self._beams]
        self._move(search, [] if self._is_over(search, going_on) else going_on)

    def _follow(self, search: _Search, beam: _Beam, token: int, total: float) -> tuple[_Beam, FinishReason | None]:
        """`beam` and one token more, still in the same row; and whether that ends it."""
        writing, progress = beam.writing.copy(), None if beam.progress is None else beam.progress.copy()
        if progress is not None:
            progress.push(token)
            if progress.failure is not None:
                raise UserError(progress.failure)
        complete, full = progress is not None and progress.ended, search.written >= search.limit
        text, finish = writing.push(token, complete, full)
        return _Beam(beam.slot, writing, progress, beam.text + text, total), finish

    def _score(self, total: float, written: int) -> float:
        return total / float(written**self._length_penalty)

    def _is_over(self, search: _Search, going_on: Sequence[tuple[int, int, _Beam]]) -> bool:
        if not going_on:
            return True
        if len(search.finished) < self._beams:
            return False
        return self._early_stopping or (self._score(going_on[0][2].total, search.written) <= search.finished[-1].score)

    def _move(self, search: _Search, going_on: Sequence[tuple[int, int, _Beam]]) -> None:
        """Give the unfinished texts rows, and each its new token."""
        kept = {row for row, _, _ in going_on}
        for row, beam in enumerate(search.running):
            if row not in kept:
                self._slots.leave(beam.slot)
        for row, _, beam in going_on:
            if row in kept:
                kept.remove(row)  # the first to go on from there stays there
            else:
                beam.slot = self._slots.fork(beam.slot)
        for _, token, beam in going_on:
            beam.slot.ids.append(token)
        search.running = [beam for _, _, beam in going_on]
