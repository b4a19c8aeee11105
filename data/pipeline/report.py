"""The funnel for people: what came in, what each rule dropped, what was kept; on the terminal and as `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from config.command import table_console
from data.funnel import Funnel, total
from data.tokens import Split, TokensManifest

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""The headings of a table and its rows."""
SPLITS: tuple[Split, Split] = ("train", "val")
SPLIT_HEADINGS = ("split", "documents", "tokens", "bytes per token")
SOURCE_HEADINGS = ("source in train", "documents", "tokens", "share of tokens", "epochs")
CONTAMINATION_HEADINGS = ("evaluation set", "documents that share text with it")
FUNNEL_HEADINGS = ("step", "documents", "bytes", "share of documents")


class Step(NamedTuple):
    """One step of a funnel; `bytes` is None where none are counted, and negative where text was taken away."""

    name: str
    documents: int
    bytes: int | None = None

    def cells(self, read: int) -> tuple[str, str, str, str]:
        """Its name, documents, bytes, and share of the `read` documents."""
        share = f"{self.documents / read:.2%}" if read else ""
        return self.name, f"{self.documents:,}", "" if self.bytes is None else f"{self.bytes:,}", share


def steps(funnel: Funnel) -> list[Step]:
    """What became of the records of a source, or of all, from top to bottom."""
    return [
        *[Step(f"unreadable: {reason}", count) for reason, count in sorted(funnel.bad.items())],
        Step("read", funnel.read.documents, funnel.read.bytes),
        Step("mended", funnel.cleaned.documents, -funnel.cleaned.bytes),
        *([Step("trimmed", funnel.trimmed.documents, -funnel.trimmed.bytes)] if funnel.trimmed.documents else []),
        *[Step(f"dropped: {rule}", drop.documents, -drop.bytes) for rule, drop in sorted(funnel.dropped.items())],
        Step("kept", funnel.kept.documents, funnel.kept.bytes),
    ]


def funnel_rows(funnel: Funnel) -> list[tuple[str, str, str, str]]:
    """One row per step: its name, documents, bytes, and share of the documents that were read."""
    return [step.cells(funnel.read.documents) for step in steps(funnel)]


def split_rows(manifest: TokensManifest) -> list[tuple[str, str, str, str]]:
    """One row per split: its name, documents, tokens, and bytes of text per token."""
    rows: list[tuple[str, str, str, str]] = []
    for split in SPLITS:
        tokens = manifest.tokens(split)
        ratio = f"{manifest.bytes(split) / tokens:.3f}" if tokens else ""
        rows.append((split, f"{manifest.documents(split):,}", f"{tokens:,}", ratio))
    return rows


def source_rows(manifest: TokensManifest) -> list[tuple[str, ...]]:
    """One row per source: its name, and of the text for training documents, tokens, share of all tokens and epochs."""
    whole = max(1, manifest.tokens("train"))
    return [
        (
            name,
            f"{source.train.documents:,}",
            f"{source.train.tokens:,}",
            f"{source.train.tokens / whole:.2%}",
            f"{source.epochs:g}",
        )
        for name, source in manifest.sources.items()
    ]


def contamination_rows(manifest: TokensManifest) -> list[tuple[str, ...]]:
    """One row per evaluation set: its name, and the documents that share text with it."""
    return [(name, f"{documents:,}") for name, documents in manifest.contaminated.items()]


def _tables(manifest: TokensManifest, *before: Rows) -> list[Rows]:
    """What there is to say of the whole, each table with its headings."""
    tables: list[Rows] = [*before, (SPLIT_HEADINGS, [*split_rows(manifest)])]
    if len(manifest.sources) > 1:
        tables.append((SOURCE_HEADINGS, source_rows(manifest)))
    if manifest.contaminated:
        tables.append((CONTAMINATION_HEADINGS, contamination_rows(manifest)))
    return tables


def print_tables(manifest: TokensManifest) -> None:
    """Print the funnel of the corpus and the splits."""
    from rich.table import Table

    console = table_console()
    whole = total(manifest.funnel.values())
    for headings, rows in _tables(manifest, (FUNNEL_HEADINGS, [*funnel_rows(whole)])):
        table = Table(headings[0])
        for heading in headings[1:]:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    print(SPLIT_NOTES[manifest.validation])


def print_manifest(manifest: TokensManifest, tokens_dir: Path, changed: bool) -> None:
    """Print which token files lie where."""
    if not changed:
        print(f"{tokens_dir} is up to date: same sources, settings and tokenizer. --force makes it anew.")
        return
    names = ", ".join(file.name for split in SPLITS for file in manifest.splits[split][:3])
    print(f"Wrote {tokens_dir}: {names}, their .index files, manifest.json, report.html")


def markdown(manifest: TokensManifest) -> str:
    """`report.md`: the funnel of the corpus and of each source, and the splits. It depends on the manifest alone."""
    parts = ["# Token files\n", *[_table(*table) for table in _tables(manifest)]]
    parts.append(SPLIT_NOTES[manifest.validation] + "\n")
    if len(manifest.funnel) > 1:
        parts += ["## All sources\n", _table(FUNNEL_HEADINGS, funnel_rows(total(manifest.funnel.values())))]
    for name, funnel in manifest.funnel.items():
        parts += [f"## Source {name}\n", _table(FUNNEL_HEADINGS, funnel_rows(funnel))]
    return "\n".join(parts)


SPLIT_NOTES = {
    "documents": "Whole documents are held out for validation, chosen by a hash of their text.",
    "tails": "The corpus has few documents, so the last part of each is held out for validation.",
}


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
