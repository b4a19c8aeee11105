"""How fast batches come: our loader beside nanoGPT's `get_batch`, on the same token file.

    python -m benchmarks.data_loader                                            # on corpus/tokens/
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m benchmarks.data_loader --nanogpt ../nanoGPT

Reported are millions of tokens per second of processor time, both threads of ours counted, and the median of several
rounds that take turns. nanoGPT draws windows with replacement, so it neither visits every token of an epoch nor can it
resume; ours does both. Its function is read from its `train.py` and run as it stands.
"""

from __future__ import annotations

import ast
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from config.command import Overrides, Recipe, resolve, run
from config.errors import UserError
from data.data_loader import DataLoader, TokenWindows
from data.tokens import TokenFiles

Nanogpt = Annotated[Path | None, typer.Option(metavar="DIR", help="A clone of nanoGPT, to measure beside ours.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")]
Batches = Annotated[int, typer.Option(min=1, help="Batches per round.")]


def benchmark(
    overrides: Overrides = None,
    recipe: Recipe = None,
    nanogpt: Nanogpt = None,
    rounds: Rounds = 5,
    batches: Batches = 300,
) -> None:
    """Measure the loader on the training tokens."""
    from rich.console import Console
    from rich.table import Table

    config = resolve(recipe, overrides)
    tokens_dir, seed = Path(config.data.tokens_dir), config.training.seed
    files = TokenFiles(tokens_dir, "train")
    print(f"{len(files):,} tokens in {tokens_dir}")
    table = Table("rows x tokens")
    for heading in ("ours", "nanoGPT", "ours / nanoGPT"):
        table.add_column(heading, justify="right")
    for rows, length in ((12, 64), (32, 256), (12, 1024), (64, 1024)):
        if len(files) <= length:
            continue
        windows = TokenWindows(files, length)
        loader = DataLoader(windows, batch_size=rows, seed=seed, prefetch_batches=config.data.loader.prefetch_batches)
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: next(loader),
        }
        if nanogpt is not None:
            runs["nanoGPT"] = _nanogpt_batches(nanogpt, tokens_dir, rows, length)
        with loader:
            rates = _rates(runs, batches, rounds, rows * length)
        peer = rates.get("nanoGPT")
        table.add_row(
            f"{rows} x {length}",
            f"{rates['ours']:.1f}",
            f"{peer:.1f}" if peer else "",
            f"{rates['ours'] / peer:.2f}" if peer else "",
        )
    Console(width=100).print(table)
    print("Millions of tokens per second of processor time.")


def _rates(runs: dict[str, Callable[[], Any]], batches: int, rounds: int, tokens: int) -> dict[str, float]:
    """Median over `rounds` of millions of tokens per second of processor time, for each of `runs`."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, batch in runs.items():
            start = time.process_time()
            for _ in range(batches):
                batch()
            rates[name].append(batches * tokens / (time.process_time() - start) / 1e6)
    return {name: statistics.median(values) for name, values in rates.items()}


def _nanogpt_batches(clone: Path, data_dir: Path, rows: int, length: int) -> Callable[[], Any]:
    """nanoGPT's own `get_batch`, bound to our token file."""
    path = clone / "train.py"
    if not path.exists():
        raise UserError(f"There is no train.py in {clone}. Clone https://github.com/karpathy/nanoGPT there.")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch"]
    if not functions:
        raise UserError(f"{path} has no function get_batch: it is another nanoGPT than this benchmark knows.")
    import os

    names: dict[str, Any] = {
        "os": os,
        "np": np,
        "torch": torch,
        "data_dir": str(data_dir),
        "batch_size": rows,
        "block_size": length,
        "device": "cpu",
        "device_type": "cpu",
    }
    exec(compile(ast.Module(list[ast.stmt](functions), []), str(path), "exec"), names)
    return lambda: names["get_batch"]("train")


def main() -> None:
    """Run the benchmark."""
    run(benchmark)


if __name__ == "__main__":
    main()
