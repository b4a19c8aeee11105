"""The user's own files: .txt, .md, .jsonl, .csv (each also as .gz or .zst) and .parquet, by path, folder or glob.

They lie here, or at an address of any file system that fsspec knows, such as s3://bucket/folder.

They are copied once into documents of our own layout, so that later stages read one thing, and a file that changes or
disappears meanwhile does not change what was trained on. When they are streamed, nothing is copied.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import UserError
from config.sources import FilesSourceConfig
from data.documents import bad_record, no_text, row_options
from data.formats import read_rows
from data.formats.rows import Fault, Row
from data.manifest import RawManifest
from data.published.bring import bring
from data.published.limits import choose, cut_short, rows_there, taken_bytes
from data.published.listing import ListedFile, Listing
from data.published.opening import is_local, open_published
from data.quarantine import check_bad_fraction
from data.sources import Job
from data.sources.paths import input_files
from data.store import DocumentWriter, empty_folder

if TYPE_CHECKING:
    from rich.progress import TaskID

    from data.published.limits import Chosen


def revision(name: str, config: FilesSourceConfig) -> str | None:
    """A hash over the names, sizes and times of change of the files that are here now; None if some are elsewhere."""
    import xxhash

    if not all(map(is_local, config.paths)):
        return None
    digest = xxhash.xxh3_128()
    for file in input_files(name, config):
        digest.update(f"{file.path}\0{file.size}\0{os.stat(file.url).st_mtime_ns}\0".encode())
    return digest.hexdigest()


def download(name: str, config: FilesSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Copy the documents of the files into `folder`; what is no document is set aside with its reason."""
    state = revision(name, config)
    files = input_files(name, config)
    if job.streaming:
        _check_names(name, files)
        listing = Listing(", ".join(config.paths), config.about.licence or "your own", files, state)
        return bring(name, "files", config, folder, job, lambda: listing)
    chosen = list(choose(files, job.max_bytes))
    task = job.progress.add_task(name, total=taken_bytes(chosen))
    empty_folder(folder)
    missing: Counter[tuple[str, ...]] = Counter()
    with DocumentWriter(folder, name) as writer:
        rows = done = 0
        for done, position, row in _rows(chosen, config, job, task):
            rows += row.count if isinstance(row, Fault) else 1
            where = f"{position}:{row.number}"
            if isinstance(row, Fault):
                missing[row.columns] += row.count if row.columns else 0
                writer.quarantine.add(bad_record(name, where, row))
            else:
                writer.add(where, row.text, {**row.columns, "file": position, "row": row.number})
    full = config.max_documents is not None and rows >= config.max_documents
    if not writer.documents and +missing:
        columns = max(missing, key=missing.__getitem__)
        raise no_text(name, config.text_column, columns)
    bad = writer.quarantine
    check_bad_fraction(name, writer.documents, bad.counts, bad.first, job.max_bad_fraction, bad.path)
    return RawManifest(
        source=name,
        kind="files",
        origin=", ".join(config.paths),
        revision=state,
        licence=config.about.licence or "your own",
        retrieved=datetime.now(UTC).replace(microsecond=0),
        settings=config.model_dump(mode="json"),
        layout="documents",
        limit=job.max_bytes if not full and cut_short(chosen, files) else None,
        taken=taken_bytes(chosen[:done] if full else chosen),
        files=writer.files,
        quarantined=dict(bad.counts),
    )


def _check_names(name: str, files: list[ListedFile]) -> None:
    """`UserError` for a name that cannot be written into a list."""
    for file in files:
        try:
            file.url.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"Source {name!r}: rename {file.path} to stream it; its name is not UTF-8.") from error


def _rows(
    chosen: list[Chosen], config: FilesSourceConfig, job: Job, task: TaskID
) -> Iterator[tuple[int, str, Row | Fault]]:
    """Number of the file, from 1, its position and row, for each row up to `config.max_documents`."""
    left = config.max_documents
    for number, choice in enumerate(chosen, start=1):
        limit = None
        if choice.take is not None:
            limit = rows_there(choice, config.text_column, config.max_document_bytes)
        if left is not None:
            limit = left if limit is None else min(limit, left)
        for row in _rows_of(choice.file, limit, config, job, task):
            if left is not None:
                left -= row.count if isinstance(row, Fault) else 1
            yield number, choice.file.path, row
        if left is not None and left <= 0:
            return


def _rows_of(
    file: ListedFile, limit: int | None, config: FilesSourceConfig, job: Job, task: TaskID
) -> Iterator[Row | Fault]:
    """The rows of one file; the bar advances by how far into the file the reader is, and Parquet by the whole file."""
    seen = 0
    with open_published(file.url, file.size, file.etag) as content:
        rows = read_rows(content, file.path, with_columns=True, limit=limit, **row_options(config))
        for count, row in enumerate(rows):
            yield row
            if count % 1000 == 0 and not file.path.endswith(".parquet"):
                job.progress.advance(task, content.tell() - seen)
                seen = content.tell()
    job.progress.advance(task, (file.size or 0) - seen)
