"""An evaluation as a person reads it in the terminal, and as a file that stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from config.files import write_text
from evaluation.perplexity import Evaluation


def print_table(evaluation: Evaluation, title: str) -> None:
    """The figures with their 95 % intervals, on standard output."""
    from rich.console import Console
    from rich.table import Table

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
    Console().print(table)


def to_json(evaluation: Evaluation, about: dict[str, Any]) -> str:
    """`about` (what was evaluated, and how) and the figures, as indented JSON."""
    return json.dumps({**about, **evaluation.to_dict()}, indent=2, ensure_ascii=False) + "\n"


def save_report(text: str, run_dir: Path | None, checkpoint: Path, name: str) -> Path:
    """Write `text` as `name` into the run's folder, or beside the checkpoint where there is no such folder."""
    path = (run_dir if run_dir is not None and run_dir.is_dir() else checkpoint.parent) / name
    write_text(path, text)
    return path


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return "too little text" if interval is None else f"{interval[0]:,.{digits}f} to {interval[1]:,.{digits}f}"
