"""How fast each library encodes the downloaded documents, and whether its ids are the reference library's.

    python -m benchmarks.tokenizer                       # on the sources in data.use
    python -m benchmarks.tokenizer data.tokenizer.vocab_size=32768 data.tokenizer.pattern=llama3

A tokenizer of each kind is trained on the documents. Then every encoder for it, and tiktoken if it is installed,
encodes all of them in turn, round after round, in batches of 1,000 documents. Reported are megabytes of text per
core-second: of the first round, when caches are empty, and the median of the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from config.command import Overrides, Recipe, resolve, run

if TYPE_CHECKING:
    from config.schema import Config, TokenizerConfig
    from data.tokenization.encoders import EncodeBatch

BATCH = 1000
Rounds = Annotated[int, typer.Option(help="Timed passes over the documents, after the first.", min=1)]


def benchmark(overrides: Overrides = None, recipe: Recipe = None, rounds: Rounds = 3) -> None:
    """Measure the encoders of every kind of tokenizer side by side."""
    from rich.console import Console
    from rich.table import Table

    config = resolve(recipe, overrides)
    texts = _texts(config)
    size = sum(len(text.encode()) for text in texts)
    settings = config.data.tokenizer
    print(
        f"{len(texts):,} documents, {size / 1e6:.1f} MB; vocabulary {settings.vocab_size:,}, pattern {settings.pattern}"
    )
    table = Table("kind", "encoder")
    for heading in ("first MB/core-s", "later MB/core-s", "ids"):
        table.add_column(heading, justify="right")
    for kind in ("bpe", "sentencepiece-bpe", "sentencepiece-unigram"):
        for row in _measure(texts, settings.model_copy(update={"kind": kind}), rounds):
            table.add_row(kind, *row)
    Console(width=120).print(table)


def _texts(config: Config) -> list[str]:
    from data.documents import Document, read_documents

    data = config.data
    return [
        record.text
        for name in data.use
        for record in read_documents(Path(data.raw_dir) / name, data.sources[name], name)
        if isinstance(record, Document)
    ]


def _measure(texts: list[str], config: TokenizerConfig, rounds: int) -> list[tuple[str, str, str, str]]:
    """One row per encoder: its name, the two rates, and how its ids compare with the reference's."""
    import numpy as np

    from data.tokenization.encoders import CANDIDATES, checked, reference_name
    from data.tokenization.training import train

    backend = train(iter(texts), config).backend
    encoders: dict[str, EncodeBatch] = {reference_name(config.kind): backend.encode_batch}
    notes = {reference_name(config.kind): "reference"}
    for name, make in CANDIDATES.get(config.kind, {}).items():
        encoders[name] = make(backend)
        failure = checked(backend, make)[1]
        notes[name] = "equal here, fails the self-check" if failure else "equal"
    if config.kind == "bpe" and find_spec("tiktoken"):
        encoders["tiktoken"] = _tiktoken(backend.pieces, config.pattern)
        notes["tiktoken"] = "equal"
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    expected = None
    for _ in range(rounds + 1):
        for name, encode_batch in encoders.items():
            start = time.process_time()
            rows = [ids for first in range(0, len(texts), BATCH) for ids in encode_batch(texts[first : first + BATCH])]
            rates[name].append(megabytes / (time.process_time() - start))
            expected = expected or rows
            if not all(map(np.array_equal, rows, expected)):
                notes[name] = "different"
    return [(name, f"{rate[0]:.1f}", f"{statistics.median(rate[1:]):.1f}", notes[name]) for name, rate in rates.items()]


def _tiktoken(pieces: list[bytes], pattern: str) -> EncodeBatch:
    """tiktoken on the same vocabulary; the id of a token is its rank, as ids have the order of the merges."""
    import numpy as np
    import tiktoken  # type: ignore[import-not-found, unused-ignore]

    from data.tokenization.byte_level import LLAMA3_PATTERN

    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {piece: index for index, piece in enumerate(pieces) if piece}
    regex = LLAMA3_PATTERN if pattern == "llama3" else gpt2
    library = tiktoken.Encoding("vocabulary", pat_str=regex, mergeable_ranks=ranks, special_tokens={})

    def encode_batch(texts: Sequence[str]) -> list[Any]:
        return [np.array(ids, np.uint32) for ids in library.encode_ordinary_batch(list(texts), num_threads=1)]

    return encode_batch


def main() -> None:
    """Run the benchmark."""
    run(benchmark)


if __name__ == "__main__":
    main()
