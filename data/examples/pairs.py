"""Pairs of answers as training samples: what was chosen in one row, what was rejected in the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.data_loader import IGNORED
from data.examples.packed import NOTHING, Bins

if TYPE_CHECKING:
    from data.examples.encoding import Encoded
    from data.examples.samples import ExampleSamples


class PairSamples:
    """Samples of `sample_rows` rows of `length` tokens (a `SampleSource`), with one pair in them, or several packed.

    `sides` holds the chosen and the rejected side of each pair in turn, with the prompt in both. A pair is one document
    of its sample, and takes the same places in both rows: those that its longer side needs. So rows tell of every token
    which pair it belongs to, and that is how the two sides find together again.
    """

    sample_rows = 2

    def __init__(self, sides: ExampleSamples, context_length: int, packing: bool) -> None:
        self.sides = sides
        self._sizes = sides.lengths.reshape(-1, self.sample_rows).max(axis=1) - 1
        self._bins = Bins(self._sizes, context_length, packing)
        self.length = self._bins.length

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def pairs(self) -> int:
        """Their number."""
        return len(self._sizes)

    @property
    def examples_per_sample(self) -> float:
        """The mean number of pairs."""
        return self.pairs / len(self)

    @property
    def fingerprint(self) -> str:
        """That of the sides, from which the rest follows."""
        return self.sides.fingerprint

    def pair(self, number: int) -> tuple[Encoded, Encoded]:
        """The chosen side of a pair, and the rejected one."""
        return self.sides.encoded(self.sample_rows * number), self.sides.encoded(self.sample_rows * number + 1)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Inputs, targets (-100 where nothing is trained) and numbers of pairs, each `(2 * length,)` int32.

        The first half of each is the row of what was chosen, the second that of what was rejected.
        """
        shape = (self.sample_rows, self.length)
        inputs = np.full(shape, self.sides.pad_id, dtype=np.int32)
        targets = np.full(shape, IGNORED, dtype=np.int32)
        documents = np.full(shape, NOTHING, dtype=np.int32)
        at = 0
        for number in self._bins.members(index):
            for row, (ids, trained) in enumerate(self.pair(number)):
                end = at + len(ids) - 1
                inputs[row, at:end] = ids[:-1]
                targets[row, at:end] = np.where(trained[1:], ids[1:], IGNORED)
            documents[:, at : at + self._sizes[number]] = number
            at += int(self._sizes[number])
        return inputs.ravel(), targets.ravel(), documents.ravel()

    def place(self, index: int) -> str:
        """Where its pairs were read."""
        return ", ".join(self.sides.place(self.sample_rows * number) for number in self._bins.members(index))
