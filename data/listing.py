"""What a person sees of the sources: the table of those that are there, and a line for each one that was fetched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from config.command import table_console
from config.errors import UserError
from config.sources import HubSourceConfig
from data.manifest import QUARANTINE
from data.quarantine import describe

if TYPE_CHECKING:
    from config.schema import DataConfig
    from data.download import Downloaded
    from data.manifest import RawManifest


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
    """Say in a line or two what is there now."""
    manifest = done.manifest
    where = f"to be streamed, listed in {done.folder}" if manifest.streamed else f"in {done.folder}"
    counted = "" if manifest.documents is None else f"{manifest.documents:,} documents, "
    amount = f"{counted}{_files(manifest)}{format_bytes(manifest.bytes)}, {where}"
    print(f"{name}: {amount}" if done.fetched else f"{name}: complete and unchanged, {amount}")
    if manifest.limit is not None:
        print(f"{name}: the limit of {format_bytes(manifest.limit)} left out the rest; a larger one goes on from here")
    if manifest.quarantined:
        total = sum(manifest.quarantined.values())
        print(f"{name}: {total:,} records set aside ({describe(manifest.quarantined)}), see {done.folder / QUARANTINE}")


def _files(manifest: RawManifest) -> str:
    return f"{len(manifest.files):,} files, " if manifest.documents is None else ""


def print_sources(data: DataConfig) -> None:
    """Print the table of the sources under `data.raw_dir`, or what to type where there are none."""
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
        documents = "not counted" if manifest.documents is None else f"{manifest.documents:,}"
        size = format_bytes(manifest.bytes) + (" streamed" if manifest.streamed else "")
        table.add_row(name, documents, size, date, manifest.licence, path)
    table_console(200).print(table)


def print_available(data: DataConfig) -> None:
    """Print the table of the sources that the configuration names: what they are, how large, and under which terms."""
    from rich.table import Table

    table = Table("source", "kind")
    for heading in ("size, about", "licence", "home"):
        table.add_column(heading, overflow="fold")
    for name, source in data.sources.items():
        about = source.about
        home = about.home
        if home is None and isinstance(source, HubSourceConfig):
            home = f"https://huggingface.co/datasets/{source.repository}"
        table.add_row(name, source.kind, about.size or "", about.licence or "", home or "")
    table_console(200).print(table)
    print("Sizes are those of the files to fetch, about; sets grow. Fetch one by its name, a part with --max-bytes:")
    print("python data/download_datasets.py NAME --max-bytes 1GB")


def format_bytes(count: int) -> str:
    """A size for people, in powers of 1,000: `2.3 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
