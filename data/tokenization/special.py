"""Special tokens: which names may be one, finding them in text where that is wanted, and what they do beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from config.errors import UserError

if TYPE_CHECKING:
    from data.tokenization.protocol import Span

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"

SPACE = "\u2581"  # how SentencePiece writes a space within a piece
# Unicode's White_Space, which `tokenizers` takes for it; Python's own notion has four control characters more.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def check_special_tokens(names: Sequence[str]) -> None:
    """Raise `UserError` unless `names` can be the special tokens of a tokenizer."""
    key = "data.tokenizer.special_tokens"
    if END_OF_TEXT not in names:
        raise UserError(f"{key} must hold {END_OF_TEXT}, which ends every document.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key} holds {name!r} twice.")
        if len(name) < 2 or not all("!" <= character <= "~" for character in name):
            raise UserError(f"{key}: {name!r} must be two or more printable ASCII characters without a space.")


def split_special(text: str, special_tokens: Mapping[str, int]) -> Iterator[str | int]:
    """Cut `text` at the special tokens written in it: pieces of plain text as `str`, special tokens as their id.

    The longest name wins where several begin at one place, as in Hugging Face's tokenizers.
    """
    pattern = "|".join(re.escape(name) for name in sorted(special_tokens, key=len, reverse=True))
    for part in re.split(f"({pattern})", text):
        if part in special_tokens:
            yield special_tokens[part]
        elif part:
            yield part


def trims_of(added_tokens: Iterable[Mapping[str, Any]]) -> dict[int, tuple[bool, bool]]:
    """`Backend.trims` by the list in a `tokenizer.json`."""
    trims = {token["id"]: (token["lstrip"], token["rstrip"]) for token in added_tokens if token["special"]}
    return {index: sides for index, sides in trims.items() if any(sides)}


def spans_of(text: str, sizes: Sequence[int]) -> list[Span]:
    """The characters of tokens that stand one after the other for that many UTF-8 bytes of `text`."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    spans, start = [], 0
    for size in sizes:
        end = start + size
        spans.append((owner[start], owner[end - 1] + 1) if size else (0, 0))
        start = end
    return spans
