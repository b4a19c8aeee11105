"""Bringing a source into `corpus/raw/<name>/`: skip it if it is there, otherwise fetch beside it, then change places.

While a source is fetched it lies in `corpus/raw/.<name>.partial/`, where an interrupted run is continued. The folder
without the dot is always whole: an older copy stays in use until the new one is complete.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from config.errors import UserError
from config.files import disk_errors, exclusive, local, location, recover_directory, replace_directory
from config.schema import DataConfig
from config.sources import SourceConfig
from data.manifest import MANIFEST, QUARANTINE, RawManifest, damaged_files, load_raw_manifest
from data.published.bring import check_column
from data.published.listing import ListedFile
from data.quarantine import describe
from data.sources import Job, source_of


@dataclass(frozen=True)
class Downloaded:
    """One source that is complete in `folder`; `fetched` is False where it was already."""

    folder: Path
    manifest: RawManifest
    fetched: bool


def download_source(name: str, data: DataConfig, *, job: Job, force: bool = False, verify: bool = False) -> Downloaded:
    """Make sure that the source `name` is complete on disk, as its configuration says now.

    Of a source that streams, that is the list of its files. What was fetched before it was to stream stays in use.

    Args:
        name: a key of `data.sources`.
        force: fetch even if it is there.
        verify: check the SHA-256 of what is there, not only the sizes.

    Raises `UserError` for what the user can put right; what was there before stays whole.
    """
    config = data.sources[name]
    folder = local(data.raw_dir, "data.raw_dir") / name
    job = replace(job, streaming=data.streams(name), connections_per_host=data.connections_per_host)
    limits = [limit for limit in (job.max_bytes, getattr(config, "max_bytes", None)) if limit is not None]
    job = replace(job, max_bytes=min(limits, default=None))
    with exclusive(folder, f"Another process is downloading source {folder.name!r} now. Wait until it is done."):
        recover_directory(folder)
        present = _present(folder, verify, job)
        source = source_of(config.kind)
        if present is not None and not force and _is_asked_for(present, config, job):
            state = source.revision(name, config)
            if state is None or state == present.revision:
                if present.layout == "published" and not present.streamed:
                    files = [ListedFile(file.path, str(folder / file.path)) for file in present.files]
                    check_column(name, config, files)
                return Downloaded(folder, present, fetched=False)
        if present is not None and job.streaming and not present.streamed and not force:
            raise UserError(
                f"{folder} holds what was fetched of source {name!r} with other settings, which streaming would "
                f"replace by a mere list. Move it away, or type: python data/download_datasets.py {name} --force"
            )
        partial = folder.with_name(f".{name}.partial")
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
        previous = None if force or not (folder / MANIFEST).exists() else folder
        try:
            manifest = source.download(name, config, partial, replace(job, previous=previous))
        finally:
            with suppress(OSError):
                partial.rmdir()
        if manifest.documents == 0:
            reasons = f" ({describe(manifest.quarantined)})" if manifest.quarantined else ""
            raise UserError(f"Source {name!r} holds no documents{reasons}. Choose another, or mend its files.")
        _publish(partial, folder, manifest)
    return Downloaded(folder, manifest, fetched=True)


def _is_asked_for(present: RawManifest, config: SourceConfig, job: Job) -> bool:
    """Whether what is on disk is what a download would bring now, as far as it can be told without the origin."""
    streams = present.streamed and not job.streaming
    return not streams and present.matches(config) and (present.kind == "sample" or present.within(job.max_bytes))


def raw_manifest(name: str, data: DataConfig) -> RawManifest:
    """The manifest of a source that is to be read; `UserError` where it was not downloaded.

    A source that streams need not have been: its files are listed now.
    """
    folder = location(data.raw_dir) / name
    streams = data.streams(name)
    if streams:
        present = _present(folder, verify=False, job=Job())
        if present is None or not present.matches(data.sources[name]):
            return download_source(name, data, job=Job(data.preprocess.max_bad_fraction)).manifest
        return present
    manifest = load_raw_manifest(folder)
    if manifest.streamed:
        command = f"python data/download_datasets.py {name}"
        raise UserError(f"{folder} says only where source {name!r} is, to stream it. Run {command} to fetch it.")
    return manifest


def _present(folder: Path, verify: bool, job: Job) -> RawManifest | None:
    """The manifest of what lies in `folder`, if all of it does."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = load_raw_manifest(folder)
    except UserError:
        return None
    task = job.progress.add_task(f"{folder.name}: checking", total=manifest.bytes, visible=verify)
    damaged = damaged_files(folder, manifest, verify, lambda count: job.progress.advance(task, count))
    job.progress.remove_task(task)
    return None if damaged else manifest


def _publish(partial: Path, folder: Path, manifest: RawManifest) -> None:
    """Leave nothing in `partial` but what the manifest names, save the manifest last, and put it in its place."""
    files = [] if manifest.streamed else manifest.files
    wanted = {partial / file.path for file in files} | {partial / QUARANTINE}
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in wanted:
            path.unlink()
    with disk_errors(partial):
        for path in wanted:
            if path.exists():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
    manifest.save(partial)
    replace_directory(partial, folder)


def downloaded_sources(raw_dir: Path) -> Sequence[tuple[str, RawManifest | None]]:
    """Every source under `raw_dir` by name, with None for one whose download has not finished or is damaged."""
    if not raw_dir.is_dir():
        return []
    found: dict[str, RawManifest | None] = {}
    for path in sorted(raw_dir.iterdir()):
        if path.name.startswith(".") and path.name.endswith(".partial"):
            found.setdefault(path.name[1 : -len(".partial")], None)
        elif not path.name.startswith(".") and (path / MANIFEST).exists():
            try:
                found[path.name] = load_raw_manifest(path)
            except UserError:
                found[path.name] = None
    return sorted(found.items())
