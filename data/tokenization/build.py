"""From downloaded documents to a tokenizer: what `data/tokenizer.py` does between its arguments and its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING

from config.errors import UserError
from data.tokenization.corpus import Corpus, open_corpus, training_texts
from data.tokenization.storage import check_target, read_manifest
from data.tokenization.training import limit_bytes, train

if TYPE_CHECKING:
    from config.schema import Config
    from data.tokenization.protocol import Tokenizer

Show = Callable[[int, int | None], object]


@dataclass(frozen=True)
class Built:
    """A new tokenizer, what it was trained on, what encodes with it, and how many seconds the training took."""

    tokenizer: Tokenizer
    corpus: Corpus
    encoder: str
    """The library that encodes with it, which has passed its check."""
    seconds: float


def build(config: Config, show: Show) -> Built:
    """Train the tokenizer that `config` asks for on the sources in use.

    Nothing is written. Raises `UserError` for all that would keep the tokenizer from being saved or used, as far as it
    can before the training. `show` is called with the documents read and how many there will be; at last, when all are
    read, with None.
    """
    start = perf_counter()
    check_target(Path(os.path.abspath(config.data.tokenizer_dir)))
    corpus = open_corpus(config.data)

    def advance(corpus: Corpus) -> None:
        mean = max(1, corpus.bytes // corpus.documents)
        enough = config.data.tokenizer.max_training_bytes // mean
        total = enough if corpus.expected_documents is None else min(corpus.expected_documents, enough)
        show(corpus.documents, max(total - len(corpus.held_out), corpus.documents))

    def shown() -> Iterator[str]:
        texts = training_texts(corpus, config.data, advance)
        yield from limit_bytes(texts, config.data.tokenizer.max_training_bytes)
        show(corpus.documents, None)

    tokenizer = _interruptible(lambda: train(shown(), config.data.tokenizer, config.model_dump()))
    seconds = perf_counter() - start
    return Built(tokenizer, corpus, tokenizer.encoder, seconds)


def _interruptible(work: Callable[[], Tokenizer]) -> Tokenizer:
    """The result of `work`, done in a thread of its own, so that Ctrl-C need not wait for the libraries to return."""
    results: list[Tokenizer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt as error:
        raise UserError("Stopped. Nothing was written; a tokenizer that was there is unchanged.") from error
    if errors:
        raise errors[0]
    return results[0]


def current_fingerprint(directory: Path) -> str | None:
    """Fingerprint of the tokenizer in `directory`, or None where there is none that can be read."""
    try:
        return read_manifest(directory).fingerprint
    except UserError:
        return None
