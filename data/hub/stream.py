"""The first rows of a remote data set, read without fetching its files, and stored as documents of our own layout.

Every full file of documents is a point from which an interrupted run goes on.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from pydantic import BaseModel, ValidationError

from config.files import disk_errors, write_text
from config.schema import HubSourceConfig
from data.documents import bad_record
from data.formats import read_rows
from data.formats.rows import Fault
from data.hub.repository import Hub, HubFile, Repository
from data.manifest import QUARANTINE, RawFile
from data.sources import Job
from data.store import DocumentWriter, empty_folder
from data.transport.remote import RemoteStream

STATE = "stream.json"
FILE_CHARACTERS = 64 << 20


class StreamState(BaseModel):
    """How far a stream has come: the files of documents that are complete, and the last row that is in them."""

    commit: str
    settings: dict[str, object]
    files: list[RawFile] = []
    file: int = 0
    """Index of the remote file."""
    row: int = -1
    """Number of the last row of it that is stored."""
    rows: int = 0
    """Rows read so far, good and bad."""
    documents: int = 0
    quarantined: dict[str, int] = {}
    quarantine_bytes: int = 0


def open_remote(hub: Hub, repository: Repository, file: HubFile) -> io.BufferedReader:
    """One file of a repository as a readable, seekable binary file."""
    return io.BufferedReader(RemoteStream(hub.client, hub.url(repository, file.path), file.size), 1 << 16)


def stream_documents(
    name: str, config: HubSourceConfig, folder: Path, job: Job, hub: Hub, repository: Repository, files: list[HubFile]
) -> DocumentWriter:
    """Store the first `config.max_documents` rows of `files`, or all of them, in `folder`; the writer that did it."""
    state = _load(folder, repository, config)
    task = job.progress.add_task(name, total=config.max_documents, completed=state.rows)
    writer = DocumentWriter(folder, name, files=state.files, file_characters=FILE_CHARACTERS)
    writer.documents = state.documents
    writer.quarantine.counts.update(state.quarantined)
    with writer:
        rows = state.rows
        for index in range(state.file, len(files)):
            file = files[index]
            last = state.row if index == state.file else -1
            if config.max_documents is not None and rows >= config.max_documents:
                break
            with open_remote(hub, repository, file) as content:
                for row in read_rows(content, file.path, config.text_column, start=last + 1):
                    if row.number <= last:
                        continue
                    where = f"{file.path}:{row.number}"
                    if isinstance(row, Fault):
                        writer.quarantine.add(bad_record(name, where, row))
                        rows += row.count
                    else:
                        writer.add(where, row.text, {"file": file.path, "row": row.number})
                        rows += 1
                    job.progress.update(task, completed=rows)
                    if len(writer.files) > len(state.files):
                        state = _save(folder, state, writer, index, row.number, rows)
                    if config.max_documents is not None and rows >= config.max_documents:
                        break
    return writer


def _save(folder: Path, state: StreamState, writer: DocumentWriter, file: int, row: int, rows: int) -> StreamState:
    new = StreamState(
        commit=state.commit,
        settings=state.settings,
        files=list(writer.files),
        file=file,
        row=row,
        rows=rows,
        documents=writer.documents,
        quarantined=dict(writer.quarantine.counts),
        quarantine_bytes=writer.quarantine.flush(),
    )
    write_text(folder / STATE, new.model_dump_json())
    return new


def _load(folder: Path, repository: Repository, config: HubSourceConfig) -> StreamState:
    """The state that an interrupted run of the same stream left, and nothing in `folder` that came after it."""
    fresh = StreamState(commit=repository.commit, settings=config.model_dump(mode="json"))
    try:
        state = StreamState.model_validate_json((folder / STATE).read_bytes())
    except (FileNotFoundError, ValidationError):
        state = fresh
    whole = all(
        (folder / file.path).is_file() and (folder / file.path).stat().st_size == file.bytes for file in state.files
    )
    if (state.commit, state.settings) != (fresh.commit, fresh.settings) or not whole:
        state = fresh
    if not state.files:
        empty_folder(folder)
        return fresh
    quarantine = folder / QUARANTINE
    if quarantine.exists():
        with disk_errors(quarantine):
            os.truncate(quarantine, state.quarantine_bytes)
    return state
