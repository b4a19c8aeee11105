"""BPE models that Hugging Face's `tokenizers` runs, as a `tokenizer.json` describes them."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tokenization.special import trims_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LibraryBPE:
    """What the kinds of BPE have alike; `serialized` is a Hugging Face `tokenizer.json`."""

    file_name = "tokenizer.json"
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, serialized: bytes) -> None:
        self.serialized = serialized
        self._library = open_library(serialized)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The parsed `tokenizer.json`."""
        parsed: dict[str, Any] = json.loads(self.serialized)
        return parsed

    @cached_property
    def trims(self) -> dict[int, tuple[bool, bool]]:
        return trims_of(self.description["added_tokens"])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        # Threads of the library do not survive a fork, and a worker has one core to itself anyway.
        if multiprocessing.parent_process() is not None:
            encodings = (self._library.encode(text, add_special_tokens=False) for text in texts)
        else:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _changed(self, changes: dict[str, Any]) -> Any:
        """The library with other parts of the `tokenizer.json`."""
        return open_library(json.dumps(self.description | changes, ensure_ascii=False).encode())


def open_library(serialized: bytes) -> Any:
    """The tokenizer of `tokenizers` in a `tokenizer.json`; it takes special tokens in text for text."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(serialized.decode())
    library.encode_special_tokens = True
    return library
