"""Drawing the tokens of a step: from the sequences that run to tensors, and back to tokens, waiting once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config.errors import UserError
from inference.constraints import unpack
from inference.sampling import BatchSettings, choose, log_probabilities, uniform

if TYPE_CHECKING:
    from inference.engine import Request


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of a token: logarithms of probabilities, before temperature, penalties and filters.

    `logprob` is the drawn token's; `top` holds the likeliest tokens with theirs, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def check_bias(bias: Sequence[tuple[int, float]], vocab_size: int) -> None:
    """Raise `UserError` where a bias is for a token that there is not."""
    for token, _ in bias:
        if not 0 <= token < vocab_size:
            raise UserError(f"logit_bias: there is no token {token}; this vocabulary has 0 to {vocab_size - 1}.")


def check_numbers(logits: Tensor) -> None:
    """Raise `UserError` where a model gives no numbers."""
    if not bool(logits.isfinite().all()):
        raise UserError("The weights of this checkpoint give no numbers (NaN or infinity). Use an earlier one.")


class Past:
    """What of a sequence decides its next token, besides the logits.

    `present` `(vocab,)` bool marks the tokens of prompt and text, `counts` `(vocab,)` int32 tells how often each has
    been drawn; they are kept on the device, and only for settings that look at them.
    """

    def __init__(self, request: Request, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.request = request
        self.drawn = 0
        self.present: Tensor | None = None
        self.counts: Tensor | None = None
        self.progress = None if request.constraint is None else request.constraint.begin()
        check_bias(request.sampling.logit_bias, vocab_size)
        if request.sampling.penalizes_repetition:
            self.present = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.present[torch.tensor(prompt, device=device)] = True
        if request.sampling.counts_tokens:
            self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    @property
    def ended(self) -> bool:
        """Whether the text has a form after which nothing may follow."""
        return self.progress is not None and self.progress.ended

    @property
    def failure(self) -> str | None:
        """Why the text's form could not be followed, if so."""
        return None if self.progress is None else self.progress.failure


class Chooser:
    """Draws for a batch of sequences, as long as none joins or leaves."""

    def __init__(self, pasts: Sequence[Past], vocab_size: int, device: torch.device) -> None:
        self._pasts = list(pasts)
        self._vocab_size = vocab_size
        self._device = device
        requests = [past.request for past in pasts]
        self._settings = BatchSettings([request.sampling for request in requests], device)
        self._present = self._counts = None
        # From here on each sequence holds a row of what is updated for all of them together.
        if repeating := [past for past in pasts if past.present is not None]:
            self._present = torch.stack([past.present for past in repeating if past.present is not None])
            for past, row in zip(repeating, self._present, strict=True):
                past.present = row
        if counting := [past for past in pasts if past.counts is not None]:
            self._counts = torch.stack([past.counts for past in counting if past.counts is not None])
            for past, row in zip(counting, self._counts, strict=True):
                past.counts = row
        self._asked = [place for place, request in enumerate(requests) if request.logprobs is not None]
        self._constrained = any(past.progress is not None for past in pasts)
        self._alternatives = max((request.logprobs or 0 for request in requests), default=0)

    def serves(self, pasts: Sequence[Past]) -> bool:
        """Whether `pasts` are those of this batch, in its order."""
        return len(pasts) == len(self._pasts) and all(map(operator.is_, pasts, self._pasts))

    def __call__(self, logits: Tensor) -> list[tuple[int, TokenLogprobs | None]]:
        """The next token of every sequence by `logits` `(batch, vocab)`, with what was asked to be known of it."""
        # A model may have more than there are tokens.
        logits = logits[:, : self._vocab_size].to(self._device, torch.float32)
        tokens = choose(logits, self._settings, self._uniforms(), self._present, self._counts, self._allowed())
        self._remember(tokens)
        if not self._asked:
            return self._advance([(token, None) for token in tokens.tolist()])
        rows = torch.tensor(self._asked, device=self._device)
        own, top, tops = log_probabilities(logits[rows], tokens[rows], self._alternatives)
        # float64 holds any token, so that all of it comes in one transfer.
        known = torch.cat([own[:, None], top, tops], dim=1).double()
        everything: list[float] = torch.cat([tokens.double(), known.flatten()]).tolist()
        return self._advance(self._with_logprobs(everything, top.shape[1]))

    def _uniforms(self) -> Tensor | None:
        """The random number of each row, `(batch,)` float64; None where no row needs one."""
        if self._settings.all_greedy:
            return None
        numbers = [uniform(past.request.seed, past.drawn) for past in self._pasts]
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)

    def _allowed(self) -> Tensor | None:
        """The tokens that each row may draw, `(batch, vocab)` bool; None where all may draw any."""
        if not self._constrained:
            return None
        bits = torch.full((len(self._pasts), -(-self._vocab_size // 32)), -1, dtype=torch.int32)
        for row, past in zip(bits, self._pasts, strict=True):
            if past.progress is not None:
                past.progress.fill(row)
        return unpack(bits.to(self._device), self._vocab_size)

    def _advance(self, chosen: list[tuple[int, TokenLogprobs | None]]) -> list[tuple[int, TokenLogprobs | None]]:
        """Tell the forms of what they got."""
        for past, (token, _) in zip(self._pasts, chosen, strict=True):
            if past.progress is not None:
                past.progress.push(token)
        return chosen

    def _remember(self, tokens: Tensor) -> None:
        """Take up the drawn `tokens` `(batch,)`."""
        if self._present is not None and self._settings.repeating is not None:
            self._present.scatter_(1, tokens[self._settings.repeating, None], True)
        if self._counts is not None and self._settings.counting is not None:
            new = tokens[self._settings.counting, None]
            self._counts.scatter_add_(1, new, torch.ones_like(new, dtype=torch.int32))
        for past in self._pasts:
            past.drawn += 1

    def _with_logprobs(self, numbers: list[float], count: int) -> list[tuple[int, TokenLogprobs | None]]:
        """Tokens of all, then of each that asked its logarithm, `count` likeliest tokens and their logarithms."""
        batch = len(self._pasts)
        found: list[tuple[int, TokenLogprobs | None]] = [(int(token), None) for token in numbers[:batch]]
        for row, place in enumerate(self._asked):
            own, *rest = numbers[batch + row * (1 + 2 * count) :][: 1 + 2 * count]
            wanted = min(self._pasts[place].request.logprobs or 0, count)
            top = tuple((int(token), value) for token, value in zip(rest[:wanted], rest[count:]))
            found[place] = (found[place][0], TokenLogprobs(own, top))
        return found
