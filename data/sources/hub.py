"""Data sets of the Hugging Face hub, by repository, subset and split.

The hub's client lists, authenticates and names the files; the bytes come through our own fetcher, which continues at
the byte and verifies the publisher's checksums. The repository's own files are taken where they are of a format we
read, and the hub's Parquet copy of them where not.
"""

from __future__ import annotations

from pathlib import Path

from config.errors import UserError
from config.sources import HubSourceConfig
from data.hub.data_files import converted_files, own_files
from data.hub.repository import Hub, HubFile, Repository
from data.manifest import RawManifest
from data.published.bring import bring
from data.published.listing import ListedFile, Listing
from data.sources import Job


def revision(name: str, config: HubSourceConfig) -> None:
    """None: only the hub knows. A data set that is complete is taken as it is until `--force` asks for a newer one."""
    return None


def download(name: str, config: HubSourceConfig, folder: Path, job: Job) -> RawManifest:
    """Bring the files of the split, as they are published."""
    return bring(name, "hub", config, folder, job, lambda: list_files(config))


def list_files(config: HubSourceConfig) -> Listing:
    """The files of the split, at the commit that the revision stands for now."""
    hub = Hub()
    repository, files = _find(hub, config)
    page = f"{hub.endpoint}/datasets/{config.repository}"
    subset = f", subset {config.subset}" if config.subset else ""
    return Listing(
        origin=f"{page}{subset}, split {config.split}",
        licence=repository.licence,
        revision=repository.commit,
        files=[ListedFile(file.path, hub.url(repository, file.path), file.size, file.checksum) for file in files],
        refused=f"If {config.repository} is private or gated, set HF_TOKEN to a token that may read it and accept its "
        f"conditions at {page}.",
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
