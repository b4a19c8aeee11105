"""How fast the four quality rule sets are, beside datatrove's filters on the same documents with the same words.

    python -m benchmarks.quality_rules --megabytes 20

The documents are the standard library's modules and the documentation of installed packages. In every round each set
runs once ours and once datatrove's, in turn; reported are medians of megabytes of text per core-second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.package_text import package_texts
from config.command import run

if TYPE_CHECKING:
    from config.quality import QualityConfig

BATCH = 1000
Rounds = Annotated[int, typer.Option(help="Timed passes over the documents.", min=1)]
Megabytes = Annotated[float, typer.Option(help="Text to read for our rules.", min=0.1)]
Theirs = Annotated[float, typer.Option(help="Text of it that datatrove's filters read; they are slow.", min=0.0)]


def benchmark(rounds: Rounds = 3, megabytes: Megabytes = 20, theirs: Theirs = 1) -> None:
    """Measure the rule sets side by side."""
    from rich.console import Console
    from rich.table import Table

    from config.load import load_config

    config = load_config([Path("web-data")]).data.preprocess.quality
    texts = package_texts(megabytes * 1e6, page=4000)
    ours = _ours(config)
    filters = _theirs(config)
    few = texts[: max(1, int(len(texts) * theirs / megabytes))]
    rates: dict[tuple[str, str], list[float]] = {}
    for timed in [False] + [True] * rounds:  # the first round compiles
        for name in ours:
            for who, work, documents in (("ours", ours[name], texts), ("datatrove", filters.get(name), few)):
                if work is None:
                    continue
                start = time.process_time()
                work(documents)
                taken = time.process_time() - start
                if timed:
                    rates.setdefault((name, who), []).append(
                        sum(len(text.encode()) for text in documents) / 1e6 / taken
                    )
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} million characters")
    table = Table("rule set")
    for heading in ("MB/core-s", "datatrove MB/core-s", "times"):
        table.add_column(heading, justify="right")
    for name in ours:
        mine, other = (
            statistics.median(rates[name, who]) if (name, who) in rates else 0 for who in ("ours", "datatrove")
        )
        table.add_row(name, f"{mine:.1f}", f"{other:.2f}" if other else "", f"{mine / other:.0f}" if other else "")
    Console(width=100).print(table)


def _ours(config: QualityConfig) -> dict[str, Callable[[list[str]], Any]]:
    import polars as pl

    from data.quality import c4, fineweb, gopher_quality, gopher_repetition
    from data.quality.rules import apply_quality
    from data.texts import Texts, texts_of

    def batches(work: Callable[[Texts], Any]) -> Callable[[list[str]], Any]:
        def each(texts: list[str]) -> None:
            for at in range(0, len(texts), BATCH):
                work(texts_of(pl.Series("text", texts[at : at + BATCH])))

        return each

    def whole(texts: list[str]) -> None:
        for at in range(0, len(texts), BATCH):
            apply_quality(pl.DataFrame({"text": texts[at : at + BATCH]}), config)

    return {
        "gopher_repetition": batches(
            lambda texts: gopher_repetition.gopher_repetition(texts, config.gopher_repetition)
        ),
        "gopher_quality": batches(lambda texts: gopher_quality.gopher_quality(texts, config.gopher_quality)),
        "c4": batches(lambda texts: c4.c4(texts, config.c4)),
        "fineweb": batches(lambda texts: fineweb.fineweb(texts, config.fineweb)),
        "all on every document": batches(
            lambda texts: (
                gopher_repetition.gopher_repetition(texts, config.gopher_repetition),
                gopher_quality.gopher_quality(texts, config.gopher_quality),
                c4.c4(texts, config.c4),
                fineweb.fineweb(texts, config.fineweb),
            )
        ),
        "one after the other": whole,
    }


def _theirs(config: QualityConfig) -> dict[str, Callable[[list[str]], Any]]:
    """datatrove's filters with their own limits, which are the shipped ones, and with our words and sentences."""
    import datatrove.pipeline.filters.c4_filters as c4_filters
    import datatrove.utils.word_tokenizers as word_tokenizers
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.text import split_into_parts

    from data.quality.words import count_sentences, split_words

    class Ours:
        def word_tokenize(self, text: str) -> list[str]:
            return split_words(text)

    word_tokenizers.load_word_tokenizer = lambda language: Ours()
    c4_filters.split_into_sentences = lambda text, language: [""] * count_sentences(text)
    filters = {
        "gopher_repetition": GopherRepetitionFilter(),
        "gopher_quality": GopherQualityFilter(),
        "c4": C4QualityFilter(filter_no_terminal_punct=config.c4.filter_no_terminal_punct),
        "fineweb": FineWebQualityFilter(),
    }

    def each(chosen: list[Any], stop: bool) -> Callable[[list[str]], Any]:
        def work(texts: list[str]) -> None:
            split_into_parts.cache_clear()
            for text in texts:
                document = Document(text=text, id="")
                for one in chosen:
                    if one.filter(document) is not True and stop:
                        break

        return work

    work = {name: each([one], False) for name, one in filters.items()}
    everything = list(filters.values())
    return {**work, "all on every document": each(everything, False), "one after the other": each(everything, True)}


def main() -> None:
    """Run the benchmark."""
    run(benchmark)


if __name__ == "__main__":
    main()
