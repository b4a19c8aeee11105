"""Special tokens: which names may be one, and finding them in text where that is wanted."""

import re
from collections.abc import Iterator, Mapping, Sequence

from config.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"

SPACE = "\u2581"  # how SentencePiece writes a space within a piece


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
