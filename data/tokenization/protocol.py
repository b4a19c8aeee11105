"""What a tokenizer is to its callers, and what a library of subwords is to the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["bpe", "bpe-byte-fallback", "sentencepiece-unigram", "sentencepiece-bpe"]
Span = tuple[int, int]
"""The characters of a text that a token stands for: the first, and the one after the last."""
Before = Literal["nothing", "special", "text"]
"""What stands before a text: nothing, a special token, or text that it goes on in."""


class Tokenizer(Protocol):
    """Text to token ids and back; every kind of tokenizer looks like this to the rest of the project.

    A special token written out in text stays text, unless `allow_special` says otherwise. Text must be valid Unicode:
    a lone surrogate raises `UserError`.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; ids run from 0 to `vocab_size - 1`."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Name of every special token and its id; ours take the first ids, in the order of the configuration."""

    @property
    def end_of_text_id(self) -> int:
        """Id of `<|endoftext|>`, which stands after every document; of an imported tokenizer, what ends a text."""

    @property
    def prefix_ids(self) -> Sequence[int]:
        """Ids that stand before every text given to the model, where an imported tokenizer has any; ours has none."""

    @property
    def ending_ids(self) -> Sequence[int]:
        """Ids that end what a model writes: end-of-text, and the others that came with an imported model."""

    @property
    def pad_id(self) -> int:
        """Id of `<|pad|>`, or of `<|endoftext|>` where there is none."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that determines the ids; tokens and checkpoints carry it."""

    @property
    def chat_template(self) -> str | None:
        """Jinja template of a conversation, in the form that Hugging Face's tokenizers have; None if there is none."""

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The special tokens that chat templates know by their office: "bos_token", "eos_token", "pad_token"."""

    @property
    def encoder(self) -> str:
        """Name of the library behind `encode_batch`; the first use checks it against the reference library.

        Raises `UserError` where the one asked for by name gives other ids.
        """

    @property
    def drops_first_space(self) -> bool:
        """Whether a space that a text begins with is taken away where it is decoded, since encoding put it there."""

    def encode(self, text: str, *, allow_special: bool = False, continued: bool = False) -> list[int]:
        """Ids of `text`; with `allow_special`, special tokens written in it become their ids.

        Some imported tokenizers put a space in front of a text; if it is `continued`, it goes on in another, and has
        none.
        """

    def encode_between(self, text: str, before: int | None, after: int | None) -> tuple[list[int], list[Span]]:
        """Ids of `text` between two special tokens, or None for the ends of the whole, and what each id stands for.

        Some imported special tokens swallow the white space beside them.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, (tokens,) uint32, the same ones as `encode` gives, by the fastest library that does."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD. Unknown id: `ValueError`.

        See `drops_first_space`.
        """

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of `ids`, one token's after the other's; for streaming through an incremental UTF-8 decoder.

        A first space is there, even if `decode` drops it.
        """

    def token_bytes(self) -> NDArray[np.int32]:
        """(vocab_size,) int32: number of UTF-8 bytes of text that each id stands for, 0 for special tokens."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer to `directory`, in place of what tokenizer was there, all of it at once."""


class Backend(Protocol):
    """A trained subword model of one library: plain text to ids, knowing nothing of special tokens in text."""

    @property
    def kind(self) -> Kind:
        """As `data.tokenizer.kind`."""

    @property
    def pieces(self) -> list[bytes]:
        """For every id the bytes it stands for; empty for special tokens."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model."""

    @property
    def file_name(self) -> str:
        """Name of the model's file, as other tools expect it."""

    @property
    def serialized(self) -> bytes:
        """Content of that file."""

    @property
    def tokenizer_class(self) -> str | None:
        """Class of `transformers` that reads the file and gives the same ids, if there is one."""

    @property
    def drops_first_space(self) -> bool:
        """As `Tokenizer.drops_first_space`."""

    @property
    def trims(self) -> Mapping[int, tuple[bool, bool]]:
        """The special tokens that swallow white space, and whether before and after them."""

    def encode(self, text: str, *, before: Before = "nothing") -> list[int]:
        """Ids by the reference library; text that spells a special token is text.

        What stands `before` the text decides whether a space is put in front of it, where the tokenizer does that.
        """

    def encode_spans(self, text: str, *, before: Before = "nothing") -> tuple[list[int], list[Span]]:
        """The same, and the characters that each id stands for, or stands for a part of."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The same for many texts."""
