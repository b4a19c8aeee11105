"""How fast BPE is trained, beside other trainers, and whether the merges are those of `tokenizers`.

    pip install rustbpe
    python -m benchmarks.tokenizer_training --megabytes 100 --vocab-size 32768

The texts are modules and documentation of installed packages. In every round each trainer runs once; reported are the
medians of core-seconds and seconds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from benchmarks.package_text import package_texts
from config.command import run

Rounds = Annotated[int, typer.Option(help="Timed runs of each trainer.", min=1)]
Megabytes = Annotated[float, typer.Option(help="Text to train on.", min=0.1)]
Merges = list[list[str]]


def benchmark(rounds: Rounds = 3, megabytes: Megabytes = 20, vocab_size: int = 32768, pattern: str = "gpt2") -> None:
    """Train with every trainer that is installed, in turn."""
    from rich.console import Console
    from rich.table import Table

    from config.load import load_config

    config = load_config(overrides=[f"data.tokenizer.vocab_size={vocab_size}", f"data.tokenizer.pattern={pattern}"])
    texts = package_texts(megabytes * 1e6)
    trainers: dict[str, Callable[[], Merges | None]] = {
        "quern": lambda: _ours(texts, config.data.tokenizer),
        "tokenizers": lambda: _tokenizers(texts, config.data.tokenizer),
        "rustbpe": lambda: _rustbpe(texts, vocab_size, pattern),
    }
    _ours(texts[:10], config.data.tokenizer)  # compiles
    times: dict[str, list[tuple[float, float]]] = {}
    merges: dict[str, Merges | None] = {}
    for _ in range(rounds):
        for name, train in trainers.items():
            begin = time.process_time(), time.perf_counter()
            try:
                merges[name] = train()
            except ImportError:
                continue
            times.setdefault(name, []).append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    print(f"{sum(len(text.encode()) for text in texts) / 1e6:.1f} MB, vocabulary {vocab_size:,}, pattern {pattern}")
    table = Table("trainer")
    for heading in ("core-seconds", "seconds", "merges as tokenizers"):
        table.add_column(heading, justify="right")
    for name, taken in times.items():
        same = "" if merges[name] is None else "yes" if merges[name] == merges["tokenizers"] else "no"
        table.add_row(name, *[f"{statistics.median(column):.1f}" for column in zip(*taken)], same)
    Console(width=100).print(table)


def _ours(texts: list[str], config: Any) -> Merges:
    from data.tokenization.byte_level import train_byte_level

    merges: Merges = json.loads(train_byte_level(iter(texts), config).serialized)["model"]["merges"]
    return merges


def _tokenizers(texts: list[str], config: Any) -> Merges:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from data.tokenization.byte_level import BYTE_OF, LLAMA3_PATTERN

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if config.pattern == "llama3":
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=list(config.special_tokens),
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    library.train_from_iterator(iter(texts), trainer)
    merges: Merges = json.loads(library.to_str())["model"]["merges"]
    return merges


def _rustbpe(texts: list[str], vocab_size: int, pattern: str) -> None:
    import rustbpe  # type: ignore[import-untyped, import-not-found, unused-ignore]

    from data.tokenization.byte_level import LLAMA3_PATTERN

    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    library = rustbpe.Tokenizer()
    library.train_from_iterator(iter(texts), vocab_size, pattern=LLAMA3_PATTERN if pattern == "llama3" else gpt2)


def main() -> None:
    """Run the command."""
    run(benchmark)


if __name__ == "__main__":
    main()
