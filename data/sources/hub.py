"""Data sets of the Hugging Face hub, by repository, subset and split.

The hub's client lists, authenticates and names the files; the bytes come through our own fetcher, which continues at
the byte and verifies the publisher's checksums. The repository's own files are taken where they are of a format we
read, and the hub's Parquet copy of them where not.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from config.errors import UserError
from config.files import disk_errors
from config.schema import HubSourceConfig
from data.formats import count_rows, read_rows
from data.formats.rows import Fault
from data.hub.data_files import converted_files, own_files
from data.hub.repository import Hub, HubFile, Repository
from data.hub.stream import open_remote, stream_documents
from data.manifest import RawFile, RawManifest, file_sha256, load_raw_manifest
from data.quarantine import check_bad_fraction
from data.sources import Job
from data.transport.notes import RemoteFile, write_note
from data.transport.parallel import fetch_files
from data.transport.retry import FetchError


def revision(name: str, config: HubSourceConfig) -> None:
    """None: only the hub knows. A data set that is complete is taken as it is until `--force` asks for a newer one."""
    return None


def download(name: str, config: HubSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Fetch the files of the split into `folder` as they are published; or, streaming, store its first rows."""
    quarantined: dict[str, int] = {}
    with Hub() as hub:
        asking = job.progress.add_task(f"{name}: asking {hub.endpoint.partition('//')[2]}", total=None)
        repository, files = _find(hub, config)
        try:
            _check_column(name, config, hub, repository, files[0])
            job.progress.remove_task(asking)
            if config.streaming:
                writer = stream_documents(name, config, folder, job, hub, repository, files)
                bad = writer.quarantine
                check_bad_fraction(name, writer.documents, bad.counts, bad.first, job.max_bad_fraction, bad.path)
                stored, quarantined = writer.files, dict(bad.counts)
            else:
                stored = _fetch(name, config, folder, job, hub, repository, files)
        except FetchError as error:
            if error.status in (401, 403):
                raise UserError(
                    f"{error} If {config.repository} is private or gated, set HF_TOKEN to a token that may read it "
                    f"and accept its conditions at {hub.endpoint}/datasets/{config.repository}."
                ) from error
            raise
    subset = f", subset {config.subset}" if config.subset else ""
    return RawManifest(
        source=name,
        kind="hub",
        origin=f"{hub.endpoint}/datasets/{config.repository}{subset}, split {config.split}",
        revision=repository.commit,
        licence=repository.licence,
        retrieved=datetime.now(UTC).replace(microsecond=0),
        settings=config.model_dump(mode="json"),
        layout="documents" if config.streaming else "published",
        files=stored,
        quarantined=quarantined,
    )


def _find(hub: Hub, config: HubSourceConfig) -> tuple[Repository, list[HubFile]]:
    """The state of the repository that has the split, and the split's files in it."""
    repository = hub.repository(config.repository, config.revision)
    files = own_files(repository, config.subset, config.split)
    if files:
        return repository, files
    converted = hub.converted(config.repository)
    files = converted_files(converted, config.subset, config.split) if converted is not None else []
    if converted is None or not files:
        raise UserError(
            f"{config.repository} has no Parquet, JSON Lines or CSV files for split {config.split!r}"
            + (f" of subset {config.subset!r}" if config.subset else "")
            + ", and the hub has no Parquet copy of it. Choose another split, subset or data set."
        )
    licence = {"licence": repository.licence}
    return Repository(**{**vars(converted), **licence}), files


def _check_column(name: str, config: HubSourceConfig, hub: Hub, repository: Repository, file: HubFile) -> None:
    """Look at the first row before fetching it all, and name the columns if the text column is not among them."""
    with open_remote(hub, repository, file) as content:
        row = next(iter(read_rows(content, file.path, config.text_column, limit=1)), None)
    if isinstance(row, Fault) and row.columns and config.text_column not in row.columns:
        raise UserError(
            f"{config.repository} has no column {config.text_column!r}. Its columns are: {', '.join(row.columns)}. "
            f"Set data.sources.{name}.text_column to one of them."
        )


def _fetch(
    name: str, config: HubSourceConfig, folder: Path, job: Job, hub: Hub, repository: Repository, files: list[HubFile]
) -> list[RawFile]:
    """Fetch the files, all at once, or one after the other until they hold `max_documents` rows."""
    remote = [
        RemoteFile(hub.url(repository, file.path), folder / file.path, file.size, file.checksum) for file in files
    ]
    _reuse(remote, folder, job)
    step = len(remote) if config.max_documents is None else 1
    stored: list[RawFile] = []
    rows = 0
    for start in range(0, len(remote), step):
        for done in fetch_files(remote[start : start + step], name=name, client=hub.client, progress=job.progress):
            path = done.file.path.relative_to(folder).as_posix()
            with open(done.file.path, "rb") as file:
                count = count_rows(file, path, config.text_column)
            if config.max_documents is not None:
                count = min(count, config.max_documents - rows)
            rows += count
            stored.append(RawFile(path=path, bytes=done.bytes, sha256=done.sha256, documents=count, url=done.file.url))
        if config.max_documents is not None and rows >= config.max_documents:
            break
    return stored


def _reuse(files: list[RemoteFile], folder: Path, job: Job) -> None:
    """Link files from an earlier complete download that are still what the publisher states."""
    if job.previous is None:
        return
    old = {file.path: file for file in load_raw_manifest(job.previous).files}
    for file in files:
        path = file.path.relative_to(folder).as_posix()
        kept = job.previous / path
        if path not in old or file.checksum != ("sha256", old[path].sha256) or file.path.exists() or not kept.is_file():
            continue
        if file_sha256(kept) != old[path].sha256:
            continue
        with disk_errors(file.path):
            file.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(kept, file.path)
            except OSError:
                shutil.copyfile(kept, file.path)
            write_note(file, size=old[path].bytes, sha256=old[path].sha256)
