"""Guessing the next tokens of a text from the text itself (prompt look-up decoding, Saxena 2023).

Where the last tokens of a text stand earlier in prompt or text, what followed there may well follow again, as in code,
quotations and summaries. A step that is bound by reading the weights runs a few such guesses along for little, and each
that turns out right saves a step. What is written does not depend on it: every token is drawn from the logits after the
tokens before it, by the same number of the same seed, and a guess is right where it is the token that was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

MATCH = 2  # tokens that must stand earlier in the same order
RATE = 0.2  # by how much of the way one outcome moves what is expected of the next


class Lookup:
    """The guesses for a text `ids`, to be told by `push` of every token by which its owner has let it grow."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        # What followed the last time is taken for the likeliest.
        self._after: dict[tuple[int, ...], int] = dict(
            zip(zip(*(ids[place:] for place in range(MATCH))), range(MATCH, len(ids)))
        )
        self._place = self._find()
        self._mean = 0.0

    @property
    def chance(self) -> float:
        """How likely the next guess is right: 0 where there is none, and else how often they have been, lately.

        It counts whatever could have been guessed, whether it was run along or not, and begins at 0. So it costs
        nothing to find out whether a text repeats itself.
        """
        return 0.0 if self._place is None else self._mean

    def push(self, token: int) -> None:
        """Take up the last token of the text."""
        place, found = self._place, self._find()
        if place is not None:
            right = self._ids[place] == token
            self._mean += RATE * (right - self._mean)
            # Where more than `MATCH` tokens are the same, the place is better than the last one where so many are.
            found = place + 1 if right else found
        self._place = found

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens, or none; where they reach the end of the text, they begin again."""
        if self._place is None:
            return []
        period = len(self._ids) - self._place
        return [self._ids[self._place + number % period] for number in range(count)]

    def _find(self) -> int | None:
        """The place of the token that followed the last time that the text went as it ends now."""
        ending = tuple(self._ids[-MATCH:])
        place = self._after.get(ending)
        self._after[ending] = len(self._ids)
        return place


def allot(chances: Sequence[float], most: Sequence[int], texts: int, cost: float) -> list[int]:
    """How many guesses of each of some texts a step should run, so that it gives most tokens for its time.

    `chances` tells how likely each text's next guess is right, `most` how many it may have. The step runs one token of
    `texts` texts anyway; each further token takes `cost` times as long as a step over one. The n-th guess of a text
    is of use if all before it are right, too: with n times its chance multiplied.
    """
    counts = [0] * len(chances)
    tokens, time = float(texts), 1.0 + cost * (texts - 1)
    gains = [(-chance, place) for place, chance in enumerate(chances) if most[place] > 0]
    heapify(gains)
    while gains and -gains[0][0] * time > cost * tokens:  # then (tokens + gain) / (time + cost) > tokens / time
        gain, place = -gains[0][0], gains[0][1]
        counts[place] += 1
        tokens, time = tokens + gain, time + cost
        more = counts[place] < most[place]
        heapreplace(gains, (-gain * chances[place] if more else 0.0, place))
    return counts
