"""Encoded examples as numbered training samples, and which of the examples are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from config.errors import UserError
from data.data_loader import IGNORED
from data.examples.encoding import Encoded
from data.examples.reading import Example

MULTIPLE = 8


class ExampleSamples:
    """One example per sample (a `SampleSource`), filled up with padding to the length of the longest.

    `length` is the time dimension of every sample, a multiple of 8 where `context_length` allows it; padding carries no
    loss. `locations` say where each example was read. `PackedExamples` makes samples with less padding of them.
    """

    def __init__(
        self, samples: Sequence[Encoded], pad_id: int, context_length: int, locations: Sequence[str] = ()
    ) -> None:
        self.pad_id = pad_id
        self.locations = locations
        self.ends = np.cumsum([len(sample.ids) for sample in samples], dtype=np.int64)
        self.ids = np.concatenate([sample.ids for sample in samples])
        self.trained = np.concatenate([sample.trained for sample in samples])
        longest = max(len(sample.ids) for sample in samples) - 1
        self.length = min(-(-longest // MULTIPLE) * MULTIPLE, context_length)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every example, `(examples,)`."""
        return np.diff(self.ends, prepend=0)

    @property
    def tokens(self) -> int:
        """Tokens of all examples, without padding."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Targets that carry loss, over one epoch."""
        return int(self.trained.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, the trained parts and their borders: the same set trains the same model."""
        digest = hashlib.sha256()
        for array in (self.ends, self.ids, self.trained):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def encoded(self, index: int) -> Encoded:
        """One example, without padding."""
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return Encoded(self.ids[part], self.trained[part])

    def place(self, index: int) -> str:
        """Where an example was read."""
        return self.locations[index] if self.locations else f"example {index + 1}"

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inputs and targets, each `(length,)` int32; targets hold -100 where nothing is trained."""
        ids, trained = self.encoded(index)
        inputs = np.full(self.length, self.pad_id, dtype=np.int32)
        targets = np.full(self.length, IGNORED, dtype=np.int32)
        inputs[: len(ids) - 1] = ids[:-1]
        targets[: len(ids) - 1] = np.where(trained[1:], ids[1:], IGNORED)
        return inputs, targets


def hold_out(examples: Sequence[Example], fraction: float) -> NDArray[np.bool_]:
    """Which of the examples are held out for validation, `(examples,)`.

    The share `fraction` of the distinct prompts goes to validation, those whose SHA-256 is lowest: whatever the order
    of the file, and never one prompt on both sides. `UserError` if there are fewer than two prompts.
    """
    digests = [hashlib.sha256(example.given.encode("utf-8")).digest() for example in examples]
    ranked = sorted(set(digests))
    if len(ranked) < 2:
        raise UserError(
            f"The {len(examples):,} examples have one prompt between them, so none can be held out for validation. "
            "Give examples to validate on with --validation."
        )
    held = set(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])
    return np.array([digest in held for digest in digests])


def refuse_shared_prompts(train: Sequence[Example], validation: Sequence[Example], file: Path) -> None:
    """Raise `UserError` if a validation example has the prompt of a training example."""
    seen = {example.given: example.location for example in train}
    shared = [example for example in validation if example.given in seen]
    if shared:
        raise UserError(
            f"{len(shared):,} of {len(validation):,} prompts in {file} are trained on as well, so the validation loss "
            f"would flatter the model (first: {shared[0].location}, the same as {seen[shared[0].given]}). "
            "Remove them from one of the two files."
        )
