"""Files of an earlier complete download, taken again where they are still what the publisher has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from config.errors import UserError
from config.files import disk_errors
from data.manifest import RawFile, file_sha256, load_raw_manifest
from data.published.limits import known_all
from data.published.listing import ListedFile
from data.transport.notes import RemoteFile, write_note


class Earlier:
    """The files in `folder`, which may be None, by path."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files: dict[str, RawFile] = {}
        if folder is None:
            return
        with suppress(UserError):
            manifest = load_raw_manifest(folder)
            if not manifest.streamed and manifest.layout == "published":
                self._files = {file.path: file for file in manifest.files}

    def known(self, files: Sequence[ListedFile], connections: int) -> list[ListedFile]:
        """`files`, where those that are here and have no checksum have been asked for their size and ETag."""
        unsure = [file for file in files if file.path in self._files and not (file.checksum or file.lasting)]
        asked = {file.path: file for file in known_all(unsure, connections)}
        return [asked.get(file.path, file) for file in files]

    def use(self, file: RemoteFile, listed: ListedFile) -> None:
        """Put what is here of `file` in its place, where it is undamaged and the publisher still has it so.

        A file of which only the beginning is here is gone on with.
        """
        path = listed.path
        old = self._files.get(path)
        if old is None or self._folder is None or file.path.exists() or file.part.exists():
            return
        kept = self._folder / path
        if not _same(listed, old) or not kept.is_file() or file_sha256(kept) != old.sha256:
            return
        assert old.bytes is not None and old.sha256 is not None
        if old.whole and file.wanted in (None, old.bytes):
            with disk_errors(file.path):
                file.path.parent.mkdir(parents=True, exist_ok=True)
                _link(kept, file.path)
            write_note(file, etag=old.etag, size=old.bytes, sha256=old.sha256)
        elif not path.endswith(".parquet"):
            with disk_errors(file.path):
                file.path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept, file.part)
            write_note(file, etag=old.etag)


def _link(kept: Path, target: Path) -> None:
    try:
        os.link(kept, target)
    except OSError:
        shutil.copyfile(kept, target)


def _same(file: ListedFile, old: RawFile) -> bool:
    """Whether the publisher's file has the content that `old` has, or begins with."""
    if file.checksum is not None:
        return file.checksum == old.checksum or old.whole and file.checksum == ("sha256", old.sha256)
    return file.url == old.url and (file.lasting or file.etag is not None and file.etag == old.etag)
