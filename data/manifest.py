"""`manifest.json` of one downloaded source: where it came from, when, under which licence, and what lies beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from config.errors import UserError
from config.files import write_text
from config.sources import SourceConfig

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
LEAVES_NO_TRACE = {"about", "streaming"}
CHOSEN_IN_READING = {"text_column", "keep_column", "keep"}
"""Keys of a source that do not change which published files it consists of."""


class RawFile(BaseModel):
    """One data file of a source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """Relative to the source's folder, with forward slashes."""
    bytes: int | None
    """Of the file, or of the beginning of it that is taken; None where the publisher of a streamed one does not say."""
    sha256: str | None
    """Of these bytes; None for a streamed file."""
    documents: int | None
    """Rows to read from the file, in its own order, of which it may hold more; None: all, and nobody has counted them.
    """
    url: str | None = None
    etag: str | None = None
    """What the server called this content, where that promises anything about its bytes."""
    checksum: tuple[str, str] | None = None
    """The publisher's: algorithm and digest of the whole file."""
    whole: bool = True
    """False where only the beginning of the publisher's file is taken."""


class RawManifest(BaseModel):
    """What one source consists of. It is written last, so a folder that has one is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    source: str
    kind: str
    origin: str
    """Where the data is from, in words or as an address."""
    revision: str | None = None
    """The exact state of the origin: a commit, a version, a hash over the input files."""
    licence: str
    retrieved: datetime
    settings: dict[str, Any]
    """The source's entry in the configuration, as it was when the data was fetched."""
    layout: Literal["documents", "published"]
    """`documents`: Parquet of ours with the columns id, text and metadata. `published`: files as their publisher made
    them, with the text in the column that the configuration names."""
    streamed: bool = False
    """The files are not here: they are read from their addresses."""
    limit: int | None = None
    """The limit in bytes that left something out, or None where everything is here."""
    connections: int | None = None
    """Most requests at a time that the publisher of streamed files allows, where that is known."""
    taken: int | None = None
    """Bytes that count towards the limit: of the files, or the beginnings of them, at their publisher."""
    files: list[RawFile]
    quarantined: dict[str, int] = {}
    """Records that could not be read, by reason; each one stands in `quarantine.jsonl`."""

    @property
    def documents(self) -> int | None:
        """Documents of all files together; None where some have not been counted."""
        counts = [file.documents for file in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def bytes(self) -> int:
        """Bytes of all files together, as they lie on disk or would, as far as they are known."""
        return sum(file.bytes or 0 for file in self.files)

    def matches(self, source: SourceConfig) -> bool:
        """Whether the data is what `source` asks for.

        What is chosen when published files are read, and what changes nothing in the data, does not count.
        """
        try:
            settings: SourceConfig = TypeAdapter(SourceConfig).validate_python(self.settings)
        except ValidationError:
            return False
        left_out = LEAVES_NO_TRACE | (CHOSEN_IN_READING if self.layout == "published" else set())
        return settings.model_dump(exclude=left_out) == source.model_dump(exclude=left_out)

    def within(self, limit: int | None) -> bool:
        """Whether the data is what a download with this limit in bytes would bring."""
        return self.limit == limit or self.limit is None and (limit is None or (self.taken or 0) <= limit)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        write_text(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")


def load_raw_manifest(folder: Path) -> RawManifest:
    """The manifest of the source in `folder`; `UserError` where there is none or it cannot be read."""
    command = f"python data/download_datasets.py {folder.name}"
    try:
        return RawManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There is no downloaded data in {folder}. Run {command} first.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise UserError(
            f"{folder / MANIFEST} is damaged ({where}: {problem['msg']}). Run {command} --force to fetch it again."
        ) from error


def damaged_files(
    folder: Path, manifest: RawManifest, checksums: bool, advance: Callable[[int], None] | None = None
) -> list[str]:
    """Files of the manifest that are missing or of another size or, with `checksums`, of another SHA-256.

    `advance` is called with the number of bytes checked. Of a streamed source none can be.
    """
    damaged = []
    for file in () if manifest.streamed else manifest.files:
        path = folder / file.path
        good = path.is_file() and path.stat().st_size == file.bytes
        if good and checksums:
            good = file_sha256(path, advance) == file.sha256
        if not good:
            damaged.append(file.path)
    return damaged


def file_sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()
