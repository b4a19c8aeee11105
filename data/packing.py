"""Windows that begin with a document: best-fit packing.

A document of at most a window's length lies in one window whole; of a longer one, as many windows as it fills are its
own, and what is left of it is packed like a document. The pieces go into windows longest first, each into the one where
it leaves least room (best-fit decreasing, Johnson, 1973; for language models Ding et al., 2024). Nothing is cropped, so
that every token is a target once per epoch, and little is left empty.

The table of windows follows from the lengths of the documents alone. It is made at the start of a run, in every
process: a second for two million documents, about 30 bytes of memory for each, and 90 while it is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import UserError
from data.data_loader import IGNORED, Sample, document_numbers, require_known
from data.places import place_of_tokens
from data.tokens import TokenFiles

Integers = NDArray[np.int64]
NOTHING = -1  # the document of what fills up a window


class PackedWindows:
    """Windows of `context_length` tokens in which documents begin anew (a `SampleSource`).

    What begins a document is predicted from the end-of-text id, as in generation, and never from another document; the
    continuation of a document that was split, from the token before it. `with_documents` gives the number of the
    document of each token; padding carries no loss. `UserError` where the split has no token.
    """

    def __init__(self, tokens: TokenFiles, context_length: int, with_documents: bool = False) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.with_documents = with_documents
        self.vocab_size = tokens.manifest.vocab_size
        self.end_of_text_id = tokens.manifest.end_of_text_id
        if not len(tokens):
            raise UserError(f"The {tokens.split} split in {tokens.directory} is empty. Add text.")
        self._ends = tokens.document_ends.astype(np.int64)
        lengths = np.diff(self._ends, prepend=0)
        full, rest = lengths // context_length, lengths % context_length
        self._long = np.flatnonzero(full)
        self._full_until = np.cumsum(full[self._long])
        packed = np.flatnonzero(rest)
        bins = best_fit_decreasing(rest[packed], context_length)
        self._packed = packed[np.argsort(bins, kind="stable")]
        self._packed_until = np.cumsum(np.bincount(bins))

    def __len__(self) -> int:
        return self._full + len(self._packed_until)

    @property
    def _full(self) -> int:
        """Windows that one document fills."""
        return int(self._full_until[-1]) if len(self._long) else 0

    @property
    def padding(self) -> float:
        """The share of all positions that is filled with nothing."""
        return 1.0 - len(self.tokens) / (len(self) * self.context_length)

    def sample(self, index: int) -> Sample:
        """Inputs, targets and, where asked for, numbers of documents, each (context_length,) int64, int32 the last."""
        inputs = np.full(self.context_length, self.end_of_text_id, dtype=np.int64)
        targets = np.full(self.context_length, IGNORED, dtype=np.int64)
        documents = np.full(self.context_length, NOTHING, dtype=np.int64)
        at = 0
        for document, start, stop in self._pieces(index):
            end = at + stop - start
            targets[at:end] = self.tokens.read(start, stop - start)
            inputs[at + 1 : end] = targets[at : end - 1]
            if start != self._start(document):
                inputs[at] = self.tokens.read(start - 1, 1)[0]
            documents[at:end] = document
            at = end
        require_known(targets, self.vocab_size, self.tokens)
        return (inputs, targets, document_numbers(documents)) if self.with_documents else (inputs, targets)

    def place(self, index: int) -> str:
        """Where the tokens of a sample lie, in words."""
        return ", ".join(place_of_tokens(self.tokens, start, stop - start) for _, start, stop in self._pieces(index))

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Of every piece of a window: the document, and where in all tokens its targets begin and end."""
        if index < self._full:
            place = int(np.searchsorted(self._full_until, index, side="right"))
            document = int(self._long[place])
            before = int(self._full_until[place - 1]) if place else 0
            start = self._start(document) + (index - before) * self.context_length
            return [(document, start, start + self.context_length)]
        row = index - self._full
        first = int(self._packed_until[row - 1]) if row else 0
        pieces = []
        for document in self._packed[first : self._packed_until[row]].tolist():
            stop = int(self._ends[document])
            pieces.append((document, stop - (stop - self._start(document)) % self.context_length, stop))
        return pieces

    def _start(self, document: int) -> int:
        return int(self._ends[document - 1]) if document else 0


def best_fit_decreasing(sizes: NDArray[Any], capacity: int) -> Integers:
    """The bin `(items,)` of every item, none of whose `sizes` may exceed the `capacity`.

    Items are taken from the largest to the smallest, equal ones in their order, each put where it leaves least room.
    All items of a size are placed together, so the time is that of sorting them plus a term in `capacity ** 2`.
    """
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    room: list[list[Integers]] = [[] for _ in range(capacity + 1)]  # bins by what they have left
    occupied = np.zeros(capacity + 1, dtype=np.bool_)
    placed, done, bins = np.empty(len(order), dtype=np.int64), 0, 0

    def leave(which: Integers, left: int) -> None:
        if len(which):
            room[left].append(which)
            occupied[left] = True

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        for free in [*(np.flatnonzero(occupied[size:]) + size).tolist(), None]:
            if not left:
                break
            each = (capacity if free is None else free) // size
            wanted = -(-left // each)
            if free is None:
                there = np.arange(bins, bins + wanted)
                bins, free = bins + wanted, capacity
            else:
                there, occupied[free] = np.concatenate(room[free]), False
                room[free] = []
            used = there[:wanted]
            took = np.repeat(used, each)[:left]
            placed[done : done + len(took)] = took
            full = len(took) // each
            leave(used[:full], free - each * size)
            leave(used[full:], free - (len(took) - full * each) * size)
            leave(there[wanted:], free)
            done, left = done + len(took), left - len(took)
    result = np.empty(len(order), dtype=np.int64)
    result[order] = placed
    return result
