"""What a person sees of the sources: the table of those that are there, and a line for each one that was fetched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import UserError
from data.manifest import QUARANTINE
from data.quarantine import describe

if TYPE_CHECKING:
    from config.schema import DataConfig
    from data.download import Downloaded


def check_names(names: Sequence[str], data: DataConfig) -> None:
    """Raise `UserError`, with the nearest right name, if one is no source of the configuration."""
    if not names:
        raise UserError("data.use names no source. Set it, for example to data.use='[sample]', or name one here.")
    for name in names:
        if name not in data.sources:
            near = difflib.get_close_matches(name, data.sources, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Sources are: {', '.join(data.sources)}."
            raise UserError(f"There is no source {name!r} under data.sources. {hint}")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"The source {name!r} needs a name that can be a folder's: letters, digits, and . _ + -")


def report(name: str, done: Downloaded) -> None:
    """Say in a line or two what is on disk now."""
    manifest = done.manifest
    amount = f"{manifest.documents:,} documents, {format_bytes(manifest.bytes)}, in {done.folder}"
    print(f"{name}: {amount}" if done.fetched else f"{name}: complete and unchanged, {amount}")
    if manifest.quarantined:
        total = sum(manifest.quarantined.values())
        print(f"{name}: {total:,} records set aside ({describe(manifest.quarantined)}), see {done.folder / QUARANTINE}")


def print_sources(data: DataConfig) -> None:
    """Print the table of the sources under `data.raw_dir`, or what to type where there are none."""
    from rich.console import Console
    from rich.table import Table

    from data.download import downloaded_sources

    found = downloaded_sources(Path(data.raw_dir))
    if not found:
        print(f"Nothing has been downloaded to {data.raw_dir} yet. Type: python data/download_datasets.py")
        print(f"That fetches {', '.join(data.use)}. Sources in the configuration: {', '.join(data.sources)}.")
        return
    table = Table("source")
    for heading in ("documents", "size"):
        table.add_column(heading, justify="right")
    for heading in ("date", "licence", "path"):
        table.add_column(heading, overflow="fold")
    for name, manifest in found:
        path = str(Path(data.raw_dir) / name)
        if manifest is None:
            table.add_row(name, "unfinished", "", "", "", "")
            continue
        date = manifest.retrieved.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(name, f"{manifest.documents:,}", format_bytes(manifest.bytes), date, manifest.licence, path)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def format_bytes(count: int) -> str:
    """A size for people, in powers of 1,000: `2.3 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
