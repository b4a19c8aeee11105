"""Several examples in a sample, so that little is computed on padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.data_loader import IGNORED
from data.examples.samples import MULTIPLE
from data.packing import best_fit_decreasing

if TYPE_CHECKING:
    from data.examples.samples import ExampleSamples

NOTHING = -1  # the document of what fills up a sample


class Bins:
    """Which items of so many tokens share a sequence of at most `capacity`: best-fit, or each alone.

    `length` are the tokens of the fullest, as a multiple of 8 where `capacity` allows it.
    """

    def __init__(self, sizes: NDArray[np.int64], capacity: int, packing: bool = True) -> None:
        bins = best_fit_decreasing(sizes, capacity) if packing else np.arange(len(sizes))
        self._order = np.argsort(bins, kind="stable")
        self._until = np.cumsum(np.bincount(bins))
        fullest = int(np.bincount(bins, weights=sizes).max())
        self.length = min(-(-fullest // MULTIPLE) * MULTIPLE, capacity)

    def __len__(self) -> int:
        return len(self._until)

    def members(self, index: int) -> list[int]:
        """The numbers of the items in a sequence."""
        first = int(self._until[index - 1]) if index else 0
        members: list[int] = self._order[first : self._until[index]].tolist()
        return members


class PackedExamples:
    """The examples of a set, best-fit packed into samples of at most `context_length` tokens (a `SampleSource`).

    Every example is one document of its sample, whole: attention stays within it, its positions count from 0, and its
    last token predicts nothing, so that each token has the loss and the gradient that it has in a sample of its own.
    Which examples share a sample depends on their lengths alone. `length` is the time dimension, a multiple of 8 where
    `context_length` allows it.
    """

    def __init__(self, examples: ExampleSamples, context_length: int) -> None:
        self.examples = examples
        self._bins = Bins(examples.lengths - 1, context_length)
        self.length = self._bins.length

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def examples_per_sample(self) -> float:
        """Their mean number."""
        return len(self.examples) / len(self)

    @property
    def fingerprint(self) -> str:
        """That of the examples, from which the rest follows."""
        return self.examples.fingerprint

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Inputs, targets (-100 where nothing is trained) and numbers of examples, each `(length,)` int32."""
        inputs = np.full(self.length, self.examples.pad_id, dtype=np.int32)
        targets = np.full(self.length, IGNORED, dtype=np.int32)
        documents = np.full(self.length, NOTHING, dtype=np.int32)
        at = 0
        for number in self._bins.members(index):
            ids, trained = self.examples.encoded(number)
            end = at + len(ids) - 1
            inputs[at:end] = ids[:-1]
            targets[at:end] = np.where(trained[1:], ids[1:], IGNORED)
            documents[at:end] = number
            at = end
        return inputs, targets, documents

    def place(self, index: int) -> str:
        """Where its examples were read."""
        return ", ".join(self.examples.place(number) for number in self._bins.members(index))
