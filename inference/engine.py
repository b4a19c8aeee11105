"""The generation engine: many sequences of different lengths, settings and ends, decoded together on one KV cache.

A sequence is *submitted* and waits for a slot; a step *prefills* it (runs the model over its prompt, filling its row of
the cache) and draws its first token; every later step *decodes* one token of all running sequences together. Sequences
join and leave between steps. The running ones always fill the first rows of the cache: when one leaves, the last row
moves into its place, so no step works on empty rows.

A model sees at most `context_length` tokens. When a sequence grows past that, the engine drops its oldest tokens, half
a context at a time, and prefills the rest again. Where the window begins depends on the length alone, so a prompt that
is too long is cut just as a text that became too long.

What a sequence draws depends on its own tokens, settings and seed, not on what it is batched with: on a CPU to the last
bit, elsewhere but for the rounding of matrix products, which may depend on the size of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from config.errors import UserError
from inference.runners import BLOCK, Chunk, make_runner
from inference.sampling import BatchSettings, SamplingSettings, as_int64, choose
from inference.text import Detokenizer, StopStrings
from model.cache import KVCache
from model.transformer import Transformer

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue. An empty prompt begins a new document.

    Generation ends after `max_new_tokens`, at the end-of-text token, at one of `stop_tokens`, or at a text of `stop`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingSettings = SamplingSettings()
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step gave one sequence: a token, and the text that is certain since then (maybe none).

    The texts of a sequence joined are the text of its tokens up to the stop string or token. `finish` is None until the
    last piece: "stop" for a stop string or token, "length" for `max_new_tokens`.
    """

    sequence: int
    token: int
    text: str
    finish: FinishReason | None


@dataclass(slots=True, eq=False)
class _Sequence:
    number: int
    request: Request
    ids: list[int]
    detokenizer: Detokenizer
    stops: StopStrings
    stop_tokens: frozenset[int]
    window_start: int = -1
    drawn: int = 0
    present: Tensor | None = None


@dataclass(slots=True)
class _Composition:
    """What is known of the running sequences as tensors, as long as none joins or leaves."""

    members: list[int]
    settings: BatchSettings
    seeds: Tensor


class Engine:
    """Runs up to `slots` sequences at once; further ones wait their turn.

    The model must be in evaluation mode; its device and dtype are those of the cache. `computed_tokens` counts those
    that went through it so far.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, slots: int = 1) -> None:
        self._model = model
        self._tokenizer = tokenizer
        weight = model.token_embedding.weight
        # Sampling needs float64 and 64-bit integers, which Apple's GPUs lack.
        self._sampling_device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        self._cache = KVCache(model.config, slots, device=weight.device, dtype=weight.dtype)
        self._runner = make_runner(model, self._cache)
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._submitted = 0
        self.computed_tokens = 0
        self._composition: _Composition | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._running or self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number that its pieces carry."""
        ids = list(request.prompt) or [self._tokenizer.end_of_text_id]
        sequence = _Sequence(
            number=self._submitted,
            request=request,
            ids=ids,
            detokenizer=Detokenizer(self._tokenizer),
            stops=StopStrings(request.stop),
            stop_tokens=frozenset((self._tokenizer.end_of_text_id, *request.stop_tokens)),
        )
        if request.sampling.repetition_penalty != 1.0:
            vocab_size = self._model.config.vocab_size
            assert vocab_size is not None
            sequence.present = torch.zeros(vocab_size, dtype=torch.bool, device=self._sampling_device)
            sequence.present[torch.tensor(ids, device=self._sampling_device)] = True
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
                        yield Piece(index[piece.sequence], piece.token, piece.text, piece.finish)
        finally:
            for number in index:
                self.cancel(number)

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One token for every running sequence, and the first one for those that find a free slot."""
        filling = [one for one in self._running if self._window_start(one) != one.window_start]
        for sequence in filling:
            self._release(sequence)
        while self._waiting and len(self._running) + len(filling) < self._cache.batch_size:
            filling.append(self._waiting.popleft())
        logits = []
        if self._running:
            logits.append(self._decode())
        if filling:
            logits.append(self._prefill(filling))
        if not logits:
            return []
        tokens = self._choose(torch.cat(logits) if len(logits) > 1 else logits[0])
        pieces = []
        for sequence, token in zip(list(self._running), tokens, strict=True):
            pieces.append(self._accept(sequence, token))
            if pieces[-1].finish is not None:
                self._release(sequence)
        return pieces

    def _window_start(self, sequence: _Sequence) -> int:
        """Index of the first token that the model sees: 0, and from the limit on jumping by half a context."""
        context = self._model.config.context_length
        jump = max(1, context // 2)
        return max(0, -(-(len(sequence.ids) - context) // jump) * jump)

    def _decode(self) -> Tensor:
        """Logits `(running, vocab)` after the last token of every running sequence."""
        chunks = [
            Chunk(row, len(sequence.ids) - sequence.window_start - 1, sequence.ids[-1:])
            for row, sequence in enumerate(self._running)
        ]
        return self._run(chunks).clone()

    def _prefill(self, sequences: list[_Sequence]) -> Tensor:
        """Give `sequences` the next rows; fill these; return the logits `(sequences, vocab)` after each one's tokens.

        Equal texts, such as several samples of one prompt, are computed once.
        """
        groups: dict[tuple[int, ...], list[_Sequence]] = {}
        for sequence in sequences:
            sequence.window_start = self._window_start(sequence)
            groups.setdefault(tuple(sequence.ids[sequence.window_start :]), []).append(sequence)
        first, unique = len(self._running), len(groups)
        self._running += [group[0] for group in groups.values()]
        self._running += [sequence for group in groups.values() for sequence in group[1:]]
        sources = [place for place, group in enumerate(groups.values()) for _ in group[1:]]
        last = []
        for row, window in enumerate(groups, first):
            last.append(Chunk(row, (len(window) - 1) // BLOCK * BLOCK, window[(len(window) - 1) // BLOCK * BLOCK :]))
            for start in range(0, last[-1].start, BLOCK):
                self._run([Chunk(row, start, window[start : start + BLOCK])])
        logits = self._run(last)
        if not bool(logits.isfinite().all()):
            raise UserError("The weights of this checkpoint give no numbers (NaN or infinity). Use an earlier one.")
        for row, source in enumerate(sources, first + unique):
            self._cache.copy_row(first + source, row)
        return torch.cat([logits, logits[sources]]) if sources else logits

    def _run(self, chunks: Sequence[Chunk]) -> Tensor:
        self.computed_tokens += sum(len(chunk.tokens) for chunk in chunks)
        return self._runner.run(chunks)

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of every running sequence; the one place in a step that waits for the device."""
        device = self._sampling_device
        members, batch = [sequence.number for sequence in self._running], self._composition
        if batch is None or batch.members != members:
            seeds = [as_int64(sequence.request.seed) for sequence in self._running]
            batch = self._composition = _Composition(
                members,
                BatchSettings([sequence.request.sampling for sequence in self._running], device),
                torch.tensor(seeds, device=device),
            )
        present = None
        if batch.settings.repetition_penalty is not None:
            nothing = torch.zeros(logits.shape[1], dtype=torch.bool, device=device)
            present = torch.stack([nothing if one.present is None else one.present for one in self._running])
        drawn = torch.tensor([sequence.drawn for sequence in self._running], device=device)
        tokens: list[int] = choose(logits.to(device).float(), batch.settings, present, batch.seeds, drawn).tolist()
        return tokens

    def _accept(self, sequence: _Sequence, token: int) -> Piece:
        """Append a drawn token to its sequence; work out the text it makes certain, and whether it is the last."""
        sequence.ids.append(token)
        sequence.drawn += 1
        if sequence.present is not None:
            sequence.present[token] = True
        finish: FinishReason | None = None
        stops = sequence.stops
        if token in sequence.stop_tokens:
            finish, text = "stop", stops.push(sequence.detokenizer.flush())
        else:
            text = stops.push(sequence.detokenizer.push(token))
            if not stops.stopped and sequence.drawn >= sequence.request.max_new_tokens:
                finish = "length"
                text += stops.push(sequence.detokenizer.flush())
        if stops.stopped:
            finish = "stop"
        elif finish is not None:
            text += stops.flush()
        return Piece(sequence.number, token, text, finish)

    def _release(self, sequence: _Sequence) -> None:
        """Free a running sequence's row, and close the gap with the last one."""
        row, last = self._running.index(sequence), len(self._running) - 1
        if row != last:
            self._cache.copy_row(last, row)
            self._running[row] = self._running[last]
        self._running.pop()
