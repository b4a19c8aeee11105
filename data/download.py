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
from config.files import disk_errors, exclusive, recover_directory, replace_directory
from config.schema import DataConfig
from data.manifest import MANIFEST, QUARANTINE, RawManifest, damaged_files, load_raw_manifest
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

    Args:
        name: a key of `data.sources`.
        force: fetch even if it is there.
        verify: check the SHA-256 of what is there, not only the sizes.

    Raises `UserError` for what the user can put right; what was there before stays whole.
    """
    config = data.sources[name]
    folder = Path(data.raw_dir) / name
    with exclusive(folder, f"Another process is downloading source {folder.name!r} now. Wait until it is done."):
        recover_directory(folder)
        present = _present(folder, verify, job)
        source = source_of(config.kind)
        if present is not None and not force and present.matches(config):
            state = source.revision(name, config)
            if state is None or state == present.revision:
                return Downloaded(folder, present, fetched=False)
        partial = folder.with_name(f".{name}.partial")
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
        previous = None if force or not (folder / MANIFEST).exists() else folder
        try:
            manifest = source.download(name, config, partial, replace(job, previous=previous))
        finally:
            with suppress(OSError):
                partial.rmdir()
        if not manifest.documents:
            reasons = f" ({describe(manifest.quarantined)})" if manifest.quarantined else ""
            raise UserError(f"Source {name!r} holds no documents{reasons}. Choose another, or mend its files.")
        _publish(partial, folder, manifest)
    return Downloaded(folder, manifest, fetched=True)


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
    wanted = {partial / file.path for file in manifest.files} | {partial / QUARANTINE}
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
