"""SentencePiece-like BPE on Hugging Face's `tokenizers`, as Llama 2, the first Mistral and Gemma have it.

A space is written as the marker U+2581, and most put one in front of a text. What is not in the vocabulary becomes its
UTF-8 bytes, each a token such as `<0x0A>`. Such tokenizers only come with imported models; ours are `SentencePiece`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from data.tokenization.library import LibraryBPE
from data.tokenization.protocol import Before, Kind, Span
from data.tokenization.special import SPACE

BYTE = re.compile("<0x([0-9A-F]{2})>")


class ByteFallbackBPE(LibraryBPE):
    """An imported BPE with byte fallback; `serialized` is a Hugging Face `tokenizer.json`.

    Its ids are those of `transformers`, the space in front included: where the tokenizer puts one before what follows
    a special token, too, it stands there.
    """

    kind: Kind = "bpe-byte-fallback"

    @cached_property
    def fingerprint(self) -> str:
        keys = ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
        parts = [self.kind, *(self.description[key] for key in keys)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def pieces(self) -> list[bytes]:
        added = {token["id"]: token for token in self.description["added_tokens"]}
        pieces = [b""] * (1 + max(self._library.get_vocab().values()))
        for token, index in self.description["model"]["vocab"].items():
            byte = BYTE.fullmatch(token)
            pieces[index] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        for index, token in added.items():
            pieces[index] = b"" if token["special"] else token["content"].replace(SPACE, " ").encode()
        return pieces

    @cached_property
    def drops_first_space(self) -> bool:
        return any(step["type"] == "Strip" and step["start"] for step in steps(self.description["decoder"]))

    def encode(self, text: str, *, before: Before = "nothing") -> list[int]:
        ids: list[int] = self._library_after(before).encode(text, add_special_tokens=False).ids
        return ids

    def encode_spans(self, text: str, *, before: Before = "nothing") -> tuple[list[int], list[Span]]:
        encoding = self._library_after(before).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _library_after(self, before: Before) -> Any:
        begins = before == "nothing" or (before == "special" and self._prefixes_every_part)
        return self._library if begins else self._unprefixed

    @cached_property
    def _prefixes_every_part(self) -> bool:
        """Whether a space is put in front of what follows a special token, and not only of the whole text."""
        first = [step.get("prepend_scheme") == "always" for step in steps(self.description["pre_tokenizer"])]
        return any([*first, *(step["type"] == "Prepend" for step in steps(self.description["normalizer"]))])

    @cached_property
    def _unprefixed(self) -> Any:
        """The library without a space in front of anything."""
        normalizers = [step for step in steps(self.description["normalizer"]) if step["type"] != "Prepend"]
        cutters = [
            step | {"prepend_scheme": "never"} if step["type"] == "Metaspace" else step
            for step in steps(self.description["pre_tokenizer"])
        ]
        changed = {
            "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters} if cutters else None,
        }
        return self._changed(changed)


def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The single steps of a normalizer, pre-tokenizer or decoder of a `tokenizer.json`, in order."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key, ()):
            yield from steps(inner)
