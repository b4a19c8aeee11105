"""Training a tokenizer on a stream of texts, of which only a share may be wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from config.errors import UserError
from config.schema import TokenizerConfig
from data.tokenization.byte_level import train_byte_level
from data.tokenization.chat import DEFAULT_TEMPLATE, TEMPLATE_TOKENS
from data.tokenization.encoders import check_encoder
from data.tokenization.protocol import Backend
from data.tokenization.special import check_special_tokens
from data.tokenization.subword import SubwordTokenizer


def train(texts: Iterator[str], config: TokenizerConfig, settings: dict[str, Any] | None = None) -> SubwordTokenizer:
    """See `data.tokenization.train_tokenizer`."""
    check_special_tokens(config.special_tokens)
    check_encoder(config.kind, config.encoder)
    counted = _Counted(limit_bytes(texts, config.max_training_bytes))
    backend: Backend
    if config.kind == "bpe":
        backend = train_byte_level(counted, config)
    else:
        from data.tokenization.sentence_piece import train_sentence_piece

        backend = train_sentence_piece(counted, config)
    if not counted.characters:
        raise UserError("There is no text to train a tokenizer on: the sources in data.use are empty.")
    template = DEFAULT_TEMPLATE if TEMPLATE_TOKENS <= set(config.special_tokens) else None
    settings = settings or {"data": {"tokenizer": config.model_dump()}}
    special_tokens = {name: index for index, name in enumerate(config.special_tokens)}
    return SubwordTokenizer(backend, special_tokens, template, config.encoder, settings)


class _Counted:
    """An iterator of texts that knows how many characters went through it."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text


def limit_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` UTF-8 bytes of `texts`; the last text is cut where a character ends."""
    for text in texts:
        size = len(text.encode())
        if size > limit:
            yield text.encode()[:limit].decode(errors="ignore")
            return
        yield text
        limit -= size
        if not limit:
            return


def interleave(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """Texts of all `sources`, each time from the one that has given the fewest bytes so far, until all are empty.

    So however short the stream is cut, its sources have equal shares, as far as they hold that much.
    """
    given = dict.fromkeys(range(len(sources)), 0)
    while given:
        index = min(given, key=given.__getitem__)
        text = next(sources[index], None)
        if text is None:
            del given[index]
            continue
        given[index] += len(text.encode())
        yield text
