"""An evaluation as a person reads it in the terminal, and as a file that stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from evaluation.bootstrap import joined
from evaluation.perplexity import Evaluation

BLOCKS = ("loss", "tokens", "text_loss", "bytes")
"""The columns of `Evaluation.block_sums`, as a report calls them."""
STEPS = "evaluations"
"""The folder, in that of a run, where the results of every step stay."""


def print_table(evaluation: Evaluation, title: str, sources: Mapping[str, Evaluation] | None = None) -> None:
    """The figures with their 95 % intervals, on standard output, and the main ones of each source."""
    from rich.table import Table

    from config.command import table_console

    table = Table()
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_row("loss (nats per token)", f"{evaluation.loss:.4f}", _interval(evaluation.loss_interval, 4))
    table.add_row("perplexity", f"{evaluation.perplexity:,.2f}", _interval(evaluation.perplexity_interval, 2))
    if evaluation.bits_per_byte is not None:
        interval = _interval(evaluation.bits_per_byte_interval, 4)
        table.add_row("bits per byte", f"{evaluation.bits_per_byte:.4f}", interval)
    table.add_row("tokens scored", f"{evaluation.tokens:,}", "")
    if evaluation.bytes is not None:
        table.add_row("bytes they stand for", f"{evaluation.bytes:,}", "")
    print(title)
    table_console().print(table)
    if not sources:
        return
    table = Table()
    for column in ("source", "tokens", "loss", "95 % interval", "bits per byte", "95 % interval"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, found in sources.items():
        bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
        intervals = [_interval(interval, 4) for interval in (found.loss_interval, found.bits_per_byte_interval)]
        table.add_row(name, f"{found.tokens:,}", f"{found.loss:.4f}", intervals[0], bits, intervals[1])
    table_console().print(table)


def to_json(evaluation: Evaluation, about: dict[str, Any], sources: Mapping[str, Evaluation] | None = None) -> str:
    """`about` (what was evaluated, and how), the figures, and what the bootstrap draws from, as indented JSON."""
    parts = {"sources": {name: found.to_dict() for name, found in sources.items()}} if sources else {}
    whole = json.dumps({**about, **evaluation.to_dict(), **parts, "blocks": None}, indent=2, ensure_ascii=False)
    blocks = {
        name: [round(value, 4) for value in column]
        for name, column in zip(BLOCKS, joined(evaluation.block_sums).T.tolist(), strict=True)
    }
    return whole.replace('"blocks": null', f'"blocks": {json.dumps(blocks)}') + "\n"


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return "too little text" if interval is None else f"{interval[0]:,.{digits}f} to {interval[1]:,.{digits}f}"
