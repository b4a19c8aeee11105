"""Tokenizers: one protocol, with byte-level BPE and SentencePiece behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.tokenization.protocol import Tokenizer

if TYPE_CHECKING:
    from config.schema import TokenizerConfig

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]


def load_tokenizer(directory: Path, encoder: str | None = None) -> Tokenizer:
    """The tokenizer saved in `directory`; `encoder` as `data.tokenizer.encoder`, by default as it was when trained.

    Raises `UserError` where there is none, or where its files do not belong together.
    """
    from data.tokenization.subword import SubwordTokenizer

    return SubwordTokenizer.load(directory, encoder)


def train_tokenizer(texts: Iterator[str], config: TokenizerConfig, settings: dict[str, Any] | None = None) -> Tokenizer:
    """Train on `texts`, read once, as far as the first `config.max_training_bytes` bytes of them.

    The same texts and configuration give the same ids. `settings` is the whole configuration, if there is more of it,
    to be saved beside the tokenizer. Raises `UserError` where there is no text, where the vocabulary
    is too small to hold all bytes and special tokens, or, for SentencePiece, too large for the text.
    """
    from data.tokenization.training import train

    return train(texts, config, settings)
