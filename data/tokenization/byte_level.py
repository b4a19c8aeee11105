"""Byte-level BPE (Radford et al., 2019) on Hugging Face's `tokenizers`.

Text is cut into words by a pattern, every word is a sequence of bytes, and the merges learnt in training join them.
All 256 bytes are in the vocabulary, so any text can be written and comes back as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from config.errors import UserError
from data.tokenization.library import LibraryBPE
from data.tokenization.protocol import Before, Kind, Span
from data.tokenization.special import spans_of

if TYPE_CHECKING:
    from config.schema import TokenizerConfig

# The pattern of Llama 3. GPT-2's is built into `tokenizers` (ByteLevel with use_regex).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevelBPE(LibraryBPE):
    """A trained byte-level BPE model; `serialized` is a Hugging Face `tokenizer.json`."""

    kind: Kind = "bpe"
    drops_first_space = False

    @cached_property
    def fingerprint(self) -> str:
        parts = [self.description["model"]["vocab"], self.description["model"]["merges"]]
        parts += [self.description[key] for key in ("normalizer", "pre_tokenizer")]
        parts += [[(token["content"], token["id"]) for token in self.description["added_tokens"]]]
        if self.description["model"].get("ignore_merges"):
            parts += ["ignore_merges"]
        return hashlib.sha256(json.dumps(["bpe", *parts], sort_keys=True).encode()).hexdigest()

    @cached_property
    def pieces(self) -> list[bytes]:
        added = {token["id"]: token for token in self.description["added_tokens"]}
        pieces = [b""] * (1 + max(self._library.get_vocab().values()))
        for token, index in self.description["model"]["vocab"].items():
            if index not in added:
                pieces[index] = bytes(BYTE_OF[character] for character in token)
        for index, token in added.items():
            pieces[index] = b"" if token["special"] else token["content"].encode()
        return pieces

    def encode(self, text: str, *, before: Before = "nothing") -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_spans(self, text: str, *, before: Before = "nothing") -> tuple[list[int], list[Span]]:
        if self.description["normalizer"] is not None:
            encoding = self._untrimmed.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids = self.encode(text)
        return ids, spans_of(text, [len(self.pieces[index]) for index in ids])

    @cached_property
    def _untrimmed(self) -> Any:
        """The library without what it does to finished tokens, which leaves white space out of their places in text."""
        return self._changed({"post_processor": None})


def train_byte_level(texts: Iterator[str], config: TokenizerConfig) -> ByteLevelBPE:
    """Learn merges from `texts`, each read once; memory grows with the number of distinct words, not with the text.

    The same texts give the same merges. A corpus with fewer pairs than `config.vocab_size` asks for gives a smaller
    vocabulary.
    """
    from data.tokenization.merges import learn_merges
    from data.tokenization.words import count_words

    smallest = 256 + len(config.special_tokens)
    if config.vocab_size < smallest:
        raise UserError(
            f"data.tokenizer.vocab_size is {config.vocab_size}; bpe needs at least {smallest}: "
            f"256 bytes and {len(config.special_tokens)} special tokens."
        )
    alphabet = sorted(BYTE_OF)
    byte_ids = np.zeros(256, np.int32)
    byte_ids[[BYTE_OF[character] for character in alphabet]] = np.arange(len(config.special_tokens), smallest)
    tokens = [name.encode() for name in config.special_tokens] + [bytes([BYTE_OF[letter]]) for letter in alphabet]
    merges = learn_merges(count_words(texts, config.pattern), byte_ids, tokens, config.vocab_size)
    return ByteLevelBPE(_serialized(tokens, merges, config))


def _serialized(tokens: list[bytes], merges: list[tuple[bytes, bytes]], config: TokenizerConfig) -> bytes:
    """A `tokenizer.json` with these tokens, of which the first are the special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = len(config.special_tokens)
    names = [*config.special_tokens, *map(_written, tokens[special:])]
    vocabulary = {name: index for index, name in enumerate(names)}
    library = Tokenizer(models.BPE(vocabulary, [(_written(left), _written(right)) for left, right in merges]))
    if config.pattern == "gpt2":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(config.special_tokens))
    return str(library.to_str()).encode()


def _written(token: bytes) -> str:
    """A token as a byte-level vocabulary writes it."""
    return "".join(map(CHARACTER_OF.__getitem__, token))


def _byte_of_character() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them.

    Bytes that are printable Latin-1 characters stand for themselves; the others, in order, are U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of_character()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
