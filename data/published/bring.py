"""From a listing to a source: fetch its files, or note down where they are, as far as the limits go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import UserError
from config.files import atomic_write
from config.sources import CONVERSATIONS
from data.documents import no_text
from data.formats import DOCUMENT_BYTES, read_rows, suffix_of
from data.formats.rows import Fault, Row
from data.manifest import RawFile, RawManifest, file_sha256
from data.published.limits import Chosen, choose, copy_rows, cut_short, parquet_rows, rows_of, rows_there, taken_bytes
from data.published.listing import ListedFile, Listing
from data.published.opening import open_published
from data.published.reuse import Earlier
from data.transport.notes import Fetched, RemoteFile
from data.transport.parallel import fetch_files
from data.transport.retry import FetchError
from data.transport.slots import CONNECTIONS

if TYPE_CHECKING:
    from config.sources import PublishedSection, SourceSection
    from data.sources import Job

LOOK_ROWS = 100
A_TEXT = frozenset({"empty", "lone-surrogate", "binary"})
"""Faults of rows whose text column does hold a string."""


def bring(
    name: str, kind: str, config: PublishedSection, folder: Path, job: Job, list_files: Callable[[], Listing]
) -> RawManifest:
    """What `download` of a kind does that can list its files: the manifest of what was fetched into `folder`.

    With `job.streaming` nothing is fetched, and the manifest names the files where they are. Either way it is made of
    the same rows: the files in order up to `job.max_bytes` and `config.max_documents`.
    """
    asking = job.progress.add_task(f"{name}: asking what there is", total=None)
    listing = list_files()
    job = replace(job, connections_per_host=min(job.connections_per_host, listing.connections or sys.maxsize))
    try:
        # Of a server that sends no parts of files, one that is fetched whole is looked at when it is there.
        with nullcontext() if job.streaming else suppress(FetchError):
            check_column(name, config, listing.files, job.connections_per_host)
        limit = job.max_bytes
        work = _Work(name, config, folder, job, listing)
        chosen = work.earlier.known(listing.files, job.connections_per_host) if limit is None else listing.files
        job.progress.remove_task(asking)
        picked = list(choose(chosen, limit, job.connections_per_host))
        files, done = work.stream(picked) if job.streaming else work.fetch(picked)
    except FetchError as error:
        if error.status in (401, 403) and listing.refused:
            raise UserError(f"{error} {listing.refused}") from error
        raise
    if not files:
        raise UserError(f"Source {name!r}: not one row fits into the limit of {limit} bytes. Raise it.")
    return RawManifest(
        source=name,
        kind=kind,
        origin=listing.origin,
        revision=listing.revision,
        licence=listing.licence,
        retrieved=datetime.now(UTC).replace(microsecond=0),
        settings=config.model_dump(mode="json"),
        layout="published",
        streamed=job.streaming,
        connections=listing.connections,
        limit=limit if not work.full(files) and cut_short(picked, listing.files) else None,
        taken=taken_bytes(picked[:done]),
        files=files,
    )


def check_column(name: str, config: SourceSection, files: Sequence[ListedFile], connections: int = CONNECTIONS) -> None:
    """Look at the first rows before fetching it all, and name the columns if none of these rows has the text column."""
    column = getattr(config, "text_column", None)
    if column is None or not files or (suffix_of(files[0].path) or "").startswith((".txt", ".md")):
        return
    file = files[0]
    columns: dict[str, None] = {}
    other_kind = False
    with open_published(file.url, file.size, file.etag, connections) as content:
        for row in islice(read_rows(content, file.path, column, limit=LOOK_ROWS), LOOK_ROWS):
            other = isinstance(row, Fault) and row.reason == "text-not-a-string"
            if isinstance(row, Row) or row.reason in A_TEXT or other and column in CONVERSATIONS:
                return
            other_kind = other_kind or other
            columns.update(dict.fromkeys(row.columns))
    if columns and (other_kind or column not in columns):
        raise no_text(name, column, columns)


class _Work:
    """One source being brought."""

    def __init__(self, name: str, config: PublishedSection, folder: Path, job: Job, listing: Listing) -> None:
        self.name = name
        self.folder = folder
        self.job = job
        self.listing = listing
        self.column: str = getattr(config, "text_column", "text")
        self.most: int | None = getattr(config, "max_documents", None)
        self.document_bytes: int = getattr(config, "max_document_bytes", DOCUMENT_BYTES)
        self.earlier = Earlier(job.previous)

    def full(self, files: Sequence[RawFile]) -> bool:
        """Whether the files hold `max_documents` rows, so that more of them would add nothing."""
        return self.most is not None and sum(file.documents or 0 for file in files) >= self.most

    def stream(self, chosen: Sequence[Chosen]) -> tuple[list[RawFile], int]:
        """The files as they are listed, and how many of `chosen` that took. Rows are counted only for a limit."""
        files: list[RawFile] = []
        rows = done = 0
        for done, choice in enumerate(chosen, start=1):
            file, count = choice.file, None
            if choice.take is not None or self.most is not None:
                count = rows_there(choice, self.column, self.document_bytes, self.job.connections_per_host)
            if self.most is not None and count is not None:
                count = min(count, self.most - rows)
                rows += count
            if count != 0:
                size = file.size if choice.take is None else choice.take
                files.append(self.described(choice, RawFile(path=file.path, bytes=size, sha256=None, documents=count)))
            if rows == self.most:
                break
        return files, done

    def fetch(self, chosen: Sequence[Chosen]) -> tuple[list[RawFile], int]:
        """The files fetched, all at once or one by one until they hold `max_documents` rows, and how many that took."""
        files: list[RawFile] = []
        rows = done = 0
        step = max(1, len(chosen)) if self.most is None else 1
        for start in range(0, len(chosen), step):
            done = min(start + step, len(chosen))
            for file in self._fetch(chosen[start:done]):
                if self.most is not None and file.documents is not None:
                    file = file.model_copy(update={"documents": min(file.documents, self.most - rows)})
                    rows += file.documents or 0
                if file.documents != 0:
                    files.append(file)
            if self.most is not None and rows >= self.most:
                break
        return files, done

    def _fetch(self, chosen: Sequence[Chosen]) -> list[RawFile]:
        whole = [choice for choice in chosen if choice.take is None or not choice.file.path.endswith(".parquet")]
        remote = [self._remote(choice) for choice in whole]
        by_path = dict(zip([file.path for file in remote], whole))
        for file, choice in zip(remote, whole):
            self.earlier.use(file, choice.file)
        files = fetch_files(
            remote,
            lambda fetched: self._fetched(fetched, by_path[fetched.file.path]),
            name=self.name,
            progress=self.job.progress,
            connections_per_host=self.job.connections_per_host,
        )
        return files + [self._beginning_of_parquet(choice) for choice in chosen if choice not in whole]

    def _remote(self, choice: Chosen) -> RemoteFile:
        file = choice.file
        return RemoteFile(file.url, self.folder / file.path, file.size, file.checksum, choice.take, file.etag)

    def _fetched(self, fetched: Fetched, choice: Chosen) -> RawFile:
        """Count the rows of a file that has come."""
        with open(fetched.file.path, "rb") as content:
            rows = rows_of(content, choice, self.column, self.document_bytes)
        file = RawFile(path=choice.file.path, bytes=fetched.bytes, sha256=fetched.sha256, documents=rows)
        return self.described(choice, file, fetched.etag)

    def _beginning_of_parquet(self, choice: Chosen) -> RawFile:
        """The first rows of a Parquet file, whose footer keeps it from being cut, as a smaller Parquet file."""
        file, path = choice.file, self.folder / choice.file.path
        assert choice.take is not None
        task = self.job.progress.add_task(f"{self.name}: beginning of {path.name}", total=choice.take)
        with open_published(file.url, file.size, file.etag, self.job.connections_per_host) as content:
            rows = parquet_rows(content, choice.take)
            with atomic_write(path) as target:
                copy_rows(content, rows, target, lambda done: self.job.progress.update(task, completed=done))
        self.job.progress.remove_task(task)
        size = path.stat().st_size
        return self.described(
            choice, RawFile(path=file.path, bytes=size, sha256=file_sha256(path), documents=rows), file.etag
        )

    def described(self, choice: Chosen, file: RawFile, etag: str | None = None) -> RawFile:
        """`file` with what its publisher says of it."""
        listed = choice.file
        known = {"url": listed.url, "etag": etag or listed.etag, "checksum": listed.checksum}
        return file.model_copy(update={**known, "whole": choice.take is None})
