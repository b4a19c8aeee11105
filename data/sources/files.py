"""The user's own files: .txt, .md, .jsonl, .csv (each also as .gz or .zst) and .parquet, by path, folder or glob.

They are copied once into documents of our own layout, so that later stages read one thing, and a file that changes or
disappears meanwhile does not change what was trained on.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import UserError
from config.schema import FilesSourceConfig
from data.documents import bad_record
from data.formats import SUFFIXES, read_rows, suffix_of
from data.formats.rows import Fault, Row
from data.manifest import MANIFEST, RawManifest
from data.quarantine import check_bad_fraction
from data.sources import Job
from data.store import DocumentWriter, empty_folder

if TYPE_CHECKING:
    from rich.progress import TaskID


def revision(name: str, config: FilesSourceConfig) -> str:
    """A hash over the names, sizes and times of change of the files that are there now."""
    import xxhash

    digest = xxhash.xxh3_128()
    for position, path in input_files(name, config):
        status = path.stat()
        digest.update(f"{position}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def download(name: str, config: FilesSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Copy the documents of the files into `folder`; what is no document is set aside with its reason."""
    state = revision(name, config)
    files = input_files(name, config)
    task = job.progress.add_task(name, total=sum(path.stat().st_size for _, path in files))
    empty_folder(folder)
    missing: Counter[tuple[str, ...]] = Counter()
    with DocumentWriter(folder, name) as writer:
        for position, path in files:
            for row in _rows(path, config, job, task):
                where = f"{position}:{row.number}"
                if isinstance(row, Fault):
                    missing[row.columns] += row.count if row.columns else 0
                    writer.quarantine.add(bad_record(name, where, row))
                else:
                    writer.add(where, row.text, {**row.columns, "file": position, "row": row.number})
    if not writer.documents and +missing:
        columns = max(missing, key=missing.__getitem__)
        raise UserError(
            f"Source {name!r}: no row has text in a column {config.text_column!r}. The columns are: "
            f"{', '.join(columns)}. "
            f"Set data.sources.{name}.text_column to one of them."
        )
    bad = writer.quarantine
    check_bad_fraction(name, writer.documents, bad.counts, bad.first, job.max_bad_fraction, bad.path)
    return RawManifest(
        source=name,
        kind="files",
        origin=", ".join(config.paths),
        revision=state,
        licence="your own",
        retrieved=datetime.now(UTC).replace(microsecond=0),
        settings=config.model_dump(mode="json"),
        layout="documents",
        files=writer.files,
        quarantined=dict(bad.counts),
    )


def _rows(path: Path, config: FilesSourceConfig, job: Job, task: TaskID) -> Iterator[Row | Fault]:
    """The rows of one file; the bar advances by how far into the file the reader is, and Parquet by the whole file."""
    bounds = config.max_document_bytes
    seen = 0
    with open(path, "rb") as file:
        for count, row in enumerate(
            read_rows(file, path.name, config.text_column, with_columns=True, document_bytes=bounds)
        ):
            yield row
            if count % 1000 == 0 and path.suffix != ".parquet":
                job.progress.advance(task, file.tell() - seen)
                seen = file.tell()
    job.progress.advance(task, path.stat().st_size - seen)


def input_files(name: str, config: FilesSourceConfig) -> list[tuple[str, Path]]:
    """Every file that `paths` names, with its position: its path below the deepest folder that holds them all.

    So the positions, and the ids made of them, do not depend on where that folder lies. Sorted by position. In a folder
    or a glob, hidden files and those of other formats are passed over.
    """
    if not config.paths:
        raise UserError(
            f"Source {name!r} names no files. Set data.sources.{name}.paths, for example to '[\"notes/**/*.md\"]'; "
            "files, folders and globs will do."
        )
    found: set[Path] = set()
    for pattern in config.paths:
        found.update(Path(os.path.abspath(path)) for path in _matches(pattern))
    parent = Path(os.path.commonpath([path.parent for path in found]))
    return sorted((_readable(path.relative_to(parent).as_posix()), path) for path in found)


def _readable(name: str) -> str:
    """A file's name that can be written down, whatever bytes it is made of."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        if suffix_of(path.name) is None:
            raise UserError(f"{pattern} is of no format that can be read. Those are: {', '.join(SUFFIXES)}.")
        return [path]
    names = glob.glob(os.path.join(glob.escape(str(path)), "**") if path.is_dir() else str(path), recursive=True)
    files = [Path(name) for name in names if suffix_of(name) is not None and os.path.isfile(name) and not _ours(name)]
    if not files and names:
        raise UserError(f"{pattern} matches no file that can be read. Formats: {', '.join(SUFFIXES)}.")
    if not files:
        raise UserError(f"{pattern} matches no file. It is relative to the current folder, {Path.cwd()}.")
    return files


def _ours(name: str) -> bool:
    """Whether the file is itself a copy that a download made, met because a glob covers the corpus folder."""
    folder, file = os.path.split(name)
    return file.startswith("documents-") and file.endswith(".parquet") and (Path(folder) / MANIFEST).exists()
