"""Documents: the records that everything after the download works on, and how they are read from `corpus/raw/`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from config.errors import UserError
from config.sources import SourceConfig
from data.manifest import QUARANTINE, RawFile, RawManifest, load_raw_manifest
from data.transport.slots import CONNECTIONS

if TYPE_CHECKING:
    from data.formats.rows import Fault, Row


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `id` is a hash of the source and the position in it, so it stays the same from run to run."""

    id: str
    text: str
    source: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Something in a source that is no document: where it stands and why it was left out."""

    source: str
    location: str
    """File and row, such as `notes/a.jsonl:17`; rows count from 0."""
    reason: str
    """A short slug: `invalid-utf8`, `binary`, `empty`, `not-json`, `missing-text`, `truncated` ..."""
    excerpt: str = ""
    """The beginning of the record, so that a person can judge."""
    count: int = 1
    """Rows that this record stands for."""
    columns: tuple[str, ...] = field(default=())
    """The columns that are there, where the text column is missing or holds no text."""


def document_id(source: str, position: str) -> str:
    """128 bits of XXH3 over the source's name and the position in it, as 32 hexadecimal digits."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(f"{source}\0{position}".encode())


def read_documents(
    folder: Path, source: SourceConfig, name: str, *, part: int = 0, parts: int = 1, connections: int = CONNECTIONS
) -> Iterator[Document | BadRecord]:
    """The documents of the downloaded source in `folder`, and a `BadRecord` for each record that is none.

    With `parts` above 1, the share of worker `part`: row groups, or files where they cannot be split, are dealt out in
    turn. All parts together are the same documents with the same ids, whatever their number. Memory is bounded by the
    longest record. Of a streamed source, all readers of this machine together have at most `connections` requests at a
    time to one host, or as many as its publisher allows. Raises `UserError` at once if the data is missing, incomplete
    or not what `source` asks for.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts}")
    manifest = load_raw_manifest(folder)
    command = f"python data/download_datasets.py {name}"
    if not manifest.matches(source):
        raise UserError(f"{folder} was downloaded with other settings of data.sources.{name}. Run {command} again.")
    for file in () if manifest.streamed else manifest.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise UserError(f"{path} is missing or damaged. Run {command} to mend it.")
    return _read(folder, manifest, source, name, part, parts, connections)


def _read(
    folder: Path, manifest: RawManifest, source: SourceConfig, name: str, part: int, parts: int, connections: int
) -> Iterator[Document | BadRecord]:
    from data.formats import read_rows
    from data.quarantine import read_quarantine
    from data.store import read_stored

    if part == 0 and manifest.quarantined:
        yield from read_quarantine(folder / QUARANTINE, name)
    options = row_options(source)
    for index, raw in enumerate(manifest.files):
        wanted = _share(raw, index, len(manifest.files), part, parts, manifest.streamed)
        if wanted is None:
            continue
        with open_raw(folder, manifest, raw, connections) as file:
            if manifest.layout == "documents":
                yield from read_stored(file, name, wanted)
                continue
            for row in read_rows(file, raw.path, wanted=wanted, limit=raw.documents, cut=not raw.whole, **options):
                yield _published(name, raw.path, row)


def open_raw(folder: Path, manifest: RawManifest, raw: RawFile, connections: int = CONNECTIONS) -> IO[bytes]:
    """One file of the source in `folder`, open where it is: on disk, or at its publisher's, by so many connections."""
    if not manifest.streamed:
        return (folder / raw.path).open("rb")
    from data.published.opening import open_published

    assert raw.url is not None
    connections = min(connections, manifest.connections or connections)
    return open_published(raw.url, raw.bytes if raw.whole else None, raw.etag, connections)


def row_options(source: SourceConfig) -> dict[str, Any]:
    """How the rows of the source's files are read: arguments of `data.formats.read_rows`."""
    from data.formats import DOCUMENT_BYTES
    from data.formats.rows import Keep

    keep = getattr(source, "keep", None)
    return {
        "text_column": getattr(source, "text_column", "text"),
        "document_bytes": getattr(source, "max_document_bytes", DOCUMENT_BYTES),
        "keep": None if keep is None else Keep(getattr(source, "keep_column"), frozenset(keep)),
    }


def _share(raw: RawFile, index: int, files: int, part: int, parts: int, streamed: bool) -> Callable[[int], bool] | None:
    """Which units of file number `index` belong to `part`: a predicate, or None where none of them does.

    Whole files where there are many. Otherwise parts of what can be read from anywhere, and blocks of rows of what can
    only be read from its beginning, unless reading means fetching it.
    """
    from data.formats import SPLITTABLE

    # Where a streamed file that is not Parquet is to end is known by its rows alone.
    split = raw.path.endswith(SPLITTABLE) and (raw.whole or not streamed or raw.path.endswith(".parquet"))
    if files >= (4 * parts if split else parts) or streamed and not split:
        return (lambda unit: True) if index % parts == part else None
    if not split:
        # Reading any of its blocks means reading the file from the start, so each part has one file only.
        sharing = range(index, parts, files)
        return (lambda unit: unit % len(sharing) == part // files) if part in sharing else None
    return lambda unit: (index + unit) % parts == part


def _published(source: str, path: str, row: Row | Fault) -> Document | BadRecord:
    from data.formats.rows import Fault

    location = f"{path}:{row.number}"
    if isinstance(row, Fault):
        return bad_record(source, location, row)
    return Document(document_id(source, location), row.text, source, {**row.columns, "file": path, "row": row.number})


def no_text(source: str, column: str, columns: Iterable[str]) -> UserError:
    """What to tell the user where no row has text in the column that is read; `columns` are those that are there."""
    return UserError(
        f"Source {source!r} has no text in a column {column!r}. Its columns are: {', '.join(columns)}. "
        f"Set data.sources.{source}.text_column to one of them."
    )


def bad_record(source: str, location: str, fault: Fault) -> BadRecord:
    """What a reader found wrong, as the record that is counted and quarantined."""
    return BadRecord(source, location, fault.reason, fault.excerpt, fault.count, fault.columns)
